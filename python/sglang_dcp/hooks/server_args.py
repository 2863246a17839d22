"""SGLang's `ServerArgs` with the DCP flags as real fields, for plugin and patched trees.

As fields, the flags appear in `--help`, `sgl.Engine(...)` and `/server_info` in SGLang's
usual way. SGLang's own `dcp_size` is 1 while it resolves its arguments, and in every
scheduler. Otherwise its models, pools and allocators would divide slots by `dcp_size` a
second time. Our code reads the layout from `dcp`.
"""

# No lazy annotations: SGLang would evaluate them with the names of another module.

import argparse
import dataclasses
import logging
import os
import sys
from typing import Annotated, Any, Callable, Optional

from sglang_dcp.config import (
    DEFAULT_COMM_BACKEND,
    DcpConfig,
    DcpConfigError,
    resolve_config,
)

logger = logging.getLogger(__name__)


def extend_server_args(base: Any, module: str, name: str) -> Any:
    """Make a subclass of SGLang's `ServerArgs` that understands the DCP flags.

    Without a DCP flag it behaves as `base`. Its constructor raises `DcpConfigError` for
    sizes that disagree, and for anything that DCP does not support.

    Parameters
    ----------
    base : type
        SGLang's class.
    module, name : str
        Where the result can be imported from. Pickles name it so.
    """
    from sglang.srt.arg_groups.arg_utils import Arg

    @dataclasses.dataclass
    class DcpServerArgs(base):
        dcp_size: Annotated[
            Optional[int],
            Arg(
                help="Decode context parallelism: ranks that share K/V heads and split "
                "the sequence. Divides --tp-size. Default: tp-size / attn-tp-size.",
                aliases=["--decode-context-parallel-size"],
            ),
        ] = None
        attn_tp_size: Annotated[
            Optional[int],
            Arg(
                help="Ranks over which K/V heads are sharded; the rest of --tp-size "
                "splits the sequence. attn-tp-size x dcp-size = tp-size, and either "
                "implies the other.",
                aliases=["--attention-tensor-parallel-size"],
            ),
        ] = None
        dcp_comm_backend: Annotated[
            str,
            Arg(
                help="How the ranks' partial attention outputs are combined: "
                f"{_described_exchanges()}."
            ),
        ] = DEFAULT_COMM_BACKEND
        dcp_replicate_q_proj: Annotated[
            bool,
            Arg(
                help="Hold the Q projection at attn-tp width, so that decode gathers no "
                "queries. Costs dcp-size times the Q weights of a rank."
            ),
        ] = False
        dcp: Annotated[Optional[DcpConfig], Arg(no_cli=True)] = None

        def __post_init__(self) -> None:
            _post_init(self, super().__post_init__)

        @classmethod
        def from_cli_args(cls, args: argparse.Namespace) -> Any:
            """Build from the command line. An error prints one line and exits with 2."""
            try:
                return super().from_cli_args(args)
            except DcpConfigError as error:
                print(f"sglang-dcp: error: {error}", file=sys.stderr)
                sys.exit(2)

        def post_capture_kv_sizing_planned(self) -> bool:
            """Return False with DCP on: the resize takes one rank's tokens for logical ones.

            Every scheduler calls it. So it also ends a scheduler in which no hook of ours
            ran, which no hook could notice.
            """
            if self.dcp is None:
                return super().post_capture_kv_sizing_planned()
            _exit_without_context()
            return False

        def _get_default_attn_backend(
            self, use_mla_backend: bool, model_config: Any
        ) -> str:
            """Return SGLang's choice, or with DCP on one that can serve the model."""
            preferred = super()._get_default_attn_backend(use_mla_backend, model_config)
            if self.dcp is None:
                return preferred
            return _default_backend(self, preferred, model_config, use_mla_backend)

        def __setstate__(self, state: dict[str, Any]) -> None:
            """Unpickle in a scheduler. From now on a missing hook ends the process."""
            self.__dict__.update(state)
            if self.dcp is not None:
                from sglang_dcp.hooks.verify import require_hooks

                require_hooks()

    DcpServerArgs.__module__ = module
    DcpServerArgs.__name__ = DcpServerArgs.__qualname__ = name
    return DcpServerArgs


def _described_exchanges() -> str:
    from sglang_dcp.distributed.exchange import EXCHANGES

    return "; ".join(f"{name}, {found.summary}" for name, found in EXCHANGES.items())


def _post_init(args: Any, original: Callable[[], None]) -> None:
    """Set `args.dcp` from the flags and let SGLang resolve `args`."""
    if args.dcp is not None:
        raise DcpConfigError("dcp is derived from --dcp-size; do not pass it")
    args.dcp = _resolve(args)
    args.dcp_size = 1
    if args.dcp is None:
        original()
        return
    prepare(args)
    original()
    finish(args)


def _default_backend(args: Any, preferred: str, model: Any, mla: bool) -> str:
    from sglang_dcp.support.backends import default_backend, requirement_of

    return default_backend(preferred, requirement_of(args, model, mla))


def _resolve(args: Any) -> Optional[DcpConfig]:
    from sglang_dcp.support.server import check_comm_backend

    check_comm_backend(args.dcp_comm_backend)
    return resolve_config(
        tp_size=args.tp_size,
        dcp_size=args.dcp_size,
        attn_tp_size=args.attn_tp_size,
        comm_backend=args.dcp_comm_backend,
        replicate_q_proj=args.dcp_replicate_q_proj,
    )


def _exit_without_context() -> None:
    from sglang_dcp.context import find_context
    from sglang_dcp.hooks.verify import hooks_required

    if hooks_required() and find_context() is None:
        sys.exit(
            "sglang-dcp: error: the plugin did not load in this scheduler process; "
            "read its log, and check SGLANG_PLUGINS"
        )


def prepare(args: Any) -> None:
    """Verify hooks and check flags, before SGLang resolves `args`. `args.dcp` is set."""
    import torch

    from sglang_dcp.hooks.verify import verify_hooks
    from sglang_dcp.layers.backends.capabilities import Requirement
    from sglang_dcp.support.backends import default_backend
    from sglang_dcp.support.server import check_server_args

    verify_hooks()
    check_server_args(args)
    named = (
        args.attention_backend,
        args.prefill_attention_backend,
        args.decode_attention_backend,
    )
    # On a GPU, SGLang calls `_get_default_attn_backend` once it knows the model.
    on_cpu = args.device == "cpu" or (
        args.device is None and not torch.accelerator.is_available()
    )
    if on_cpu and all(name is None for name in named):
        args.attention_backend = default_backend(None, Requirement("cpu"))
    if not on_cpu and not args.disable_prefill_cuda_graph:
        # Set before SGLang reserves memory for these graphs. Another flag may still ask
        # for one, which `finish` turns off.
        logger.info("DCP: prefill CUDA graphs turned off")
        args.disable_prefill_cuda_graph = True


def finish(args: Any) -> None:
    """Check the model and make pages logical, after SGLang resolved `args`."""
    from sglang_dcp.support.backends import requirement_of
    from sglang_dcp.support.server import check_server_args

    if args.model_path.lower() in ("none", "dummy"):
        return
    model = args.get_model_config()
    check_server_args(args, requirement_of(args, model, args.use_mla_backend()))
    _turn_off_prefill_graph(args)
    _keep_nccl_graph_mixing(args)
    page_size = args.page_size or 1
    config = dataclasses.replace(args.dcp, page_size=page_size)
    logical = page_size * config.dcp_size
    if args.device != "cpu" and logical & (logical - 1):
        raise DcpConfigError(
            f"--page-size {page_size} x --dcp-size {config.dcp_size} is {logical}: "
            "SGLang's GPU allocator needs a power of two; choose others"
        )
    args.override(
        "dcp.logical_pages",
        dcp=config,
        dcp_size=config.dcp_size,
        attn_tp_size=config.attn_tp_size,
        page_size=logical,
        chunked_prefill_size=_align_chunk(args.chunked_prefill_size, logical),
    )


def hide_dcp_size(args: Any) -> None:
    """Set SGLang's `dcp_size` to 1 in a scheduler process (see the module docstring)."""
    args.override("dcp.own_dcp_off", dcp_size=1)


def _align_chunk(chunk: Optional[int], page: int) -> Optional[int]:
    """Round a prefill chunk down to whole logical pages, at which SGLang cuts."""
    if chunk is None or chunk <= 0 or chunk % page == 0:
        return chunk
    if chunk < page:
        raise DcpConfigError(
            f"--chunked-prefill-size {chunk} is less than one logical page of {page} "
            f"tokens (page-size x dcp-size); use at least {page}"
        )
    aligned = chunk // page * page
    logger.info("DCP: chunked_prefill_size %d -> %d, whole pages", chunk, aligned)
    return aligned


def _turn_off_prefill_graph(args: Any) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    prefill = args.cuda_graph_config.prefill
    if prefill.backend != Backend.DISABLED:
        logger.info("DCP: prefill CUDA graph (%s) turned off", prefill.backend)
        prefill.backend = Backend.DISABLED


def _keep_nccl_graph_mixing(args: Any) -> None:
    """Keep NCCL's default if MoE groups mix captured and eager calls.

    SGLang sets the variable to 0 for every `dcp_size` above 1, unless it is set already.
    `scheduler._stop_nccl_graph_mixing` explains when 0 is safe.
    """
    if args.ep_size not in (1, args.tp_size):
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "1")
