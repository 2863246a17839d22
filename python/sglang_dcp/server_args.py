"""SGLang's `ServerArgs` with the DCP flags as real fields.

The fields give the command line (`--help`), `sgl.Engine(...)` and `/server_info` the
flags in SGLang's own way. SGLang's `dcp_size` stays 1 inside: its models, pools and
allocators would localise slots a second time. What the user asked for is in `dcp`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from typing import Annotated, Any, Callable, Optional

import torch
from sglang.srt.arg_groups.arg_utils import Arg
from sglang.srt.server_args import ServerArgs

from sglang_dcp.backend_choice import default_backend, need_of
from sglang_dcp.config import DcpConfig, DcpConfigError, resolve_config
from sglang_dcp.distributed.exchange import EXCHANGES
from sglang_dcp.layers.adaptors.registry import Need

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class DcpServerArgs(ServerArgs):
    """`ServerArgs` that understands decode context parallelism.

    Without a DCP flag every method is the parent's.

    Raises
    ------
    DcpConfigError
        From the constructor, for sizes that disagree and for anything that does not
        work with DCP.
    """

    dcp_size: Annotated[
        Optional[int],
        Arg(
            help="Decode context parallelism: ranks that share K/V heads and split the "
            "sequence (KVP). Divides --tp-size. Default: tp-size / attn-tp-size.",
            aliases=["--decode-context-parallel-size"],
        ),
    ] = None
    attn_tp_size: Annotated[
        Optional[int],
        Arg(
            help="Ranks over which K/V heads are sharded; the rest of --tp-size splits "
            "the sequence. attn-tp-size x dcp-size = tp-size, either implies the other.",
            aliases=["--attention-tensor-parallel-size"],
        ),
    ] = None
    dcp_comm_backend: Annotated[
        str,
        Arg(
            help="How partial attention outputs meet: ag_rs (all-gather the LSE, "
            "reduce-scatter the outputs), a2a (one packed all-to-all) or symm_a2a (one "
            "kernel that stores to the peers over NVLink). "
            f"One of {', '.join(EXCHANGES)}.",
        ),
    ] = "ag_rs"
    dcp_replicate_q_proj: Annotated[
        bool,
        Arg(
            help="Hold the Q projection at attn-tp width, so that decode gathers no "
            "queries. Costs dcp-size times the Q weights of a rank."
        ),
    ] = False
    dcp: Annotated[Optional[DcpConfig], Arg(no_cli=True)] = None

    def __post_init__(self) -> None:
        around_post_init(super().__post_init__, self)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> DcpServerArgs:
        """Build from the command line; a refused flag is one line and exit code 2."""
        return around_from_cli_args(super().from_cli_args, cls, args)

    def post_capture_kv_sizing_planned(self) -> bool:
        """Never under DCP: the resize counts one rank's tokens as logical ones."""
        return around_post_capture_kv_sizing_planned(
            super().post_capture_kv_sizing_planned, self
        )

    def _get_default_attn_backend(
        self, use_mla_backend: bool, model_config: Any
    ) -> str:
        """SGLang's choice, or what DCP has an adaptor for."""
        return around_get_default_attn_backend(
            super()._get_default_attn_backend, self, use_mla_backend, model_config
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in a scheduler: from here on a missing seam ends the process."""
        around_setstate(self.__dict__.update, self, state)


def around_post_init(original: Callable[[], None], args: Any) -> None:
    """Seam: `ServerArgs.__post_init__`; `args.dcp` is made of what the flags say."""
    if args.dcp is not None:
        raise DcpConfigError("dcp is derived from --dcp-size; do not pass it")
    args.dcp = resolve_config(
        tp_size=args.tp_size,
        dcp_size=args.dcp_size,
        attn_tp_size=args.attn_tp_size,
        comm_backend=args.dcp_comm_backend,
        replicate_q_proj=args.dcp_replicate_q_proj,
    )
    args.dcp_size = 1
    if args.dcp is None:
        original()
        return
    prepare(args)
    original()
    finish(args)


def around_from_cli_args(
    original: Callable[..., Any], cls: type, args: argparse.Namespace
) -> Any:
    """Seam: `ServerArgs.from_cli_args`; a refused flag is one line and exit code 2."""
    try:
        return original(args)
    except DcpConfigError as error:
        sys.exit(_cli_error(error))


def around_post_capture_kv_sizing_planned(
    original: Callable[[], bool], args: Any
) -> bool:
    """Seam: `ServerArgs.post_capture_kv_sizing_planned`, never under DCP.

    Every scheduler asks. It is also where one finds out that no hook of ours ran in
    its process, which no hook could tell.
    """
    from sglang_dcp.context import find_context
    from sglang_dcp.verify import seams_required

    if args.dcp is None:
        return original()
    if seams_required() and find_context() is None:
        sys.exit(
            "sglang-dcp: error: the plugin did not load in this scheduler process; "
            "see its log, and SGLANG_PLUGINS"
        )
    return False


def around_get_default_attn_backend(
    original: Callable[..., str], args: Any, use_mla_backend: bool, model_config: Any
) -> str:
    """Seam: `ServerArgs._get_default_attn_backend`; one that DCP has an adaptor for."""
    preferred = original(use_mla_backend, model_config)
    if args.dcp is None:
        return preferred
    return default_backend(preferred, need_of(args, model_config, use_mla_backend))


def around_setstate(
    original: Callable[[dict[str, Any]], None], args: Any, state: dict[str, Any]
) -> None:
    """Seam: `ServerArgs` unpickled; from here on a missing seam ends the process."""
    original(state)
    if args.dcp is not None:
        from sglang_dcp.verify import require_seams

        require_seams()


def _cli_error(error: DcpConfigError) -> int:
    print(f"sglang-dcp: error: {error}", file=sys.stderr)
    return 2


def prepare(args: Any) -> None:
    """Before SGLang resolves `args` (whose `dcp` is set)."""
    from sglang_dcp.server_refusals import check_server_args
    from sglang_dcp.verify import verify_seams

    verify_seams()
    check_server_args(args)
    named = (
        args.attention_backend,
        args.prefill_attention_backend,
        args.decode_attention_backend,
    )
    # On a GPU, SGLang asks `_get_default_attn_backend` once it knows the model.
    on_cpu = args.device == "cpu" or (
        args.device is None and not torch.accelerator.is_available()
    )
    if on_cpu and all(name is None for name in named):
        args.attention_backend = default_backend(None, Need("cpu"))
    if not on_cpu and not args.disable_prefill_cuda_graph:
        # Before SGLang sets memory aside for them. `finish` sees to those that another
        # flag asks for.
        logger.info("DCP: prefill CUDA graphs turned off")
        args.disable_prefill_cuda_graph = True


def finish(args: Any) -> None:
    """After SGLang resolved `args`; pages become logical."""
    from sglang_dcp.server_refusals import check_server_args

    if args.model_path.lower() in ("none", "dummy"):
        return
    model = args.get_model_config()
    check_server_args(args, need_of(args, model, args.use_mla_backend()))
    _turn_off_prefill_graph(args)
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
        attn_tp_size=config.attn_tp_size,
        page_size=logical,
        chunked_prefill_size=_align_chunk(args.chunked_prefill_size, logical),
    )


def _align_chunk(chunk: Optional[int], page: int) -> Optional[int]:
    """Largest whole number of logical pages in a chunk: SGLang cuts on pages."""
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
