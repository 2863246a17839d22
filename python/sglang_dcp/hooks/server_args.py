"""SGLang's `ServerArgs` with the DCP flags as real fields, for plugin and patched trees.

As fields, the flags appear in `--help`, `sgl.Engine(...)` and `/server_info` in SGLang's
usual way. The layout that they mean is `args.dcp`, which our code reads. This module has
the rules. `server_args_dataclass` and `server_args_struct` tie them to the two forms that
SGLang's class has.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional

from sglang_dcp.config import (
    DcpConfig,
    DcpConfigError,
    Replicas,
    dcp_of,
    resolve_config,
)
from sglang_dcp.releases.api import sglang_api
from sglang_dcp.releases.installed import sglang_version

logger = logging.getLogger(__name__)

# Not a field, so it is neither a flag nor an argument that a user could pass.
_CONFIG = "_dcp_config"

_GRAPHS_OFF = "DCP: prefill CUDA graphs turned off"


def extend_server_args(base: Any, module: str, name: str) -> Any:
    """Make a subclass of SGLang's `ServerArgs` that understands the DCP flags.

    Without a DCP flag it behaves as `base`. With one, resolving it raises
    `DcpConfigError` for sizes that disagree, and for anything that DCP does not support.

    Parameters
    ----------
    base : type
        SGLang's class: a dataclass, or a record of `msgspec`.
    module, name : str
        Where the result can be imported from. Pickles name it so.
    """
    if dataclasses.is_dataclass(base):
        from sglang_dcp.hooks.server_args_dataclass import extend_dataclass

        return extend_dataclass(base, module, name)
    from sglang_dcp.hooks.server_args_struct import extend_struct

    return extend_struct(base, module, name)


def config_of(args: Any) -> Optional[DcpConfig]:
    """Return the layout, or None with DCP off or before the flags were resolved."""
    return args.__dict__.get(_CONFIG)


def set_config(args: Any, config: Optional[DcpConfig]) -> None:
    args.__dict__[_CONFIG] = config


def resolve(args: Any) -> Optional[DcpConfig]:
    """Return what the flags mean, or None if they leave DCP off.

    Raises
    ------
    DcpConfigError
        A flag is unknown, or the flags disagree.
    """
    from sglang_dcp.support.server import check_comm_backend, default_comm_backend

    if args.dcp_comm_backend is not None:
        check_comm_backend(args.dcp_comm_backend)
    return resolve_config(
        tp_size=args.tp_size,
        dcp_size=args.dcp_size,
        attn_tp_size=args.attn_tp_size,
        comm_backend=args.dcp_comm_backend,
        replicate_q_proj=args.dcp_replicate_q_proj,
        default_comm_backend=default_comm_backend(args.device),
        replicas=Replicas(*sglang_api().attention_replicas(args)),
    )


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn `DcpConfigError` into one line on stderr and exit status 2."""
    try:
        yield
    except DcpConfigError as error:
        print(f"sglang-dcp: error: {error}", file=sys.stderr)
        sys.exit(2)


def default_attn_backend(
    original: Callable[..., str], args: Any, use_mla_backend: bool, model_config: Any
) -> str:
    """Hook: `get_default_attn_backend`; with DCP on, one that can serve the model."""
    preferred = original(args, use_mla_backend, model_config)
    if dcp_of(args) is None:
        return preferred
    from sglang_dcp.support.backends import default_backend, requirement_of

    return default_backend(
        preferred, requirement_of(args, model_config, use_mla_backend)
    )


def post_capture_kv_sizing_planned(original: Callable[..., bool], args: Any) -> bool:
    """Hook: `post_capture_kv_sizing_planned`; False with DCP on.

    The resize takes one rank's tokens for logical ones.
    """
    return dcp_of(args) is None and original(args)


def require_hooks_of(args: Any) -> None:
    """Demand that hooks are live from now on, if these arguments have DCP on."""
    if args.dcp is not None:
        from sglang_dcp.hooks.verify import require_hooks

        require_hooks()


def exit_without_plugin() -> None:
    """End a process that has the arguments of a DCP server and cannot have its hooks.

    Some processes get arguments before SGLang loads plugins there, such as the workers of
    `--tokenizer-worker-num`. So it loads them first, which SGLang does only once.

    Raises
    ------
    SystemExit
    """
    from sglang.srt.plugins import load_plugins

    from sglang_dcp.hooks.inline import is_patched
    from sglang_dcp.hooks.install import is_loaded
    from sglang_dcp.hooks.verify import hooks_required

    if not hooks_required():
        return
    load_plugins()
    if not (is_loaded() or is_patched()):
        sys.exit(
            "sglang-dcp: error: the plugin did not load in this process; "
            "read its log, and check SGLANG_PLUGINS"
        )


def prepare(args: Any) -> None:
    """Verify hooks and check flags, before SGLang resolves `args`. `args.dcp` is set."""
    import torch

    from sglang_dcp.hooks.verify import verify_hooks
    from sglang_dcp.layers.backends.capabilities import Requirement
    from sglang_dcp.support.backends import default_backend
    from sglang_dcp.support.prefill_graphs import keeps_prefill_graphs
    from sglang_dcp.support.server import check_server_args

    verify_hooks()
    check_server_args(args)
    named = (
        args.attention_backend,
        args.prefill_attention_backend,
        args.decode_attention_backend,
    )
    # On a GPU, SGLang asks for its default once it knows the model.
    on_cpu = args.device == "cpu" or (
        args.device is None and not torch.accelerator.is_available()
    )
    if on_cpu and all(name is None for name in named):
        args.attention_backend = default_backend(None, Requirement("cpu"))
    keeps = keeps_prefill_graphs(args, sglang_version(), on_gpu=not on_cpu)
    if not (on_cpu or keeps or args.disable_prefill_cuda_graph):
        # Set before SGLang reserves memory for these graphs. Another flag may still ask
        # for one, which `finish` turns off.
        logger.info(_GRAPHS_OFF)
        args.disable_prefill_cuda_graph = True


def drop_prefill_graphs(args: Any) -> None:
    """Turn off prefill graphs that `prepare` kept, for a model that prefills eagerly.

    SGLang reads the model's config before it reserves memory for these graphs.
    """
    from sglang_dcp.support.rules import runs_on_gpu

    api = sglang_api()
    if runs_on_gpu(args.device) and not api.resolved(args).disable_prefill_cuda_graph:
        logger.info(_GRAPHS_OFF)
        api.declare(args, "dcp.prefill_graph", disable_prefill_cuda_graph=True)


def _settle_prefill_graphs(args: Any, resolved: Any, *, eager_model: bool) -> None:
    """Turn off what is left of prefill graphs, or say that they stay."""
    from sglang_dcp.support.prefill_graphs import keeps_prefill_graphs

    api = sglang_api()
    on_gpu = resolved.device != "cpu"
    if keeps_prefill_graphs(
        resolved, sglang_version(), on_gpu=on_gpu, eager_model=eager_model
    ):
        if api.has_prefill_graph(args):
            logger.info(
                "DCP: prefill CUDA graphs kept, attention runs between segments"
            )
    elif api.turn_off_prefill_graph(args):
        logger.info("DCP: prefill CUDA graph turned off")


def finish(args: Any) -> None:
    """Check the model and make pages logical, after SGLang resolved `args`."""
    from sglang_dcp.support.backends import requirement_of
    from sglang_dcp.support.experts import check_experts_of
    from sglang_dcp.support.kv_dtype import check_kv_dtype_of_checkpoint
    from sglang_dcp.support.lora import check_adapters_of
    from sglang_dcp.support.prefill_graphs import needs_eager_prefill
    from sglang_dcp.support.server import check_server_args

    api = sglang_api()
    resolved = api.resolved(args)
    if resolved.model_path.lower() in ("none", "dummy"):
        return
    model = api.model_config(args)
    mla = api.uses_mla(args)
    requirement = requirement_of(resolved, model, mla)
    check_kv_dtype_of_checkpoint(resolved, requirement)
    check_server_args(resolved, requirement)
    check_adapters_of(resolved, model)
    check_experts_of(resolved, (model.hf_config.architectures or ["?"])[0])
    _check_replicas(args.dcp, Replicas(*api.attention_replicas(resolved)))
    _check_draft_model(args, resolved)
    eager_model = needs_eager_prefill(model, args.dcp, resolved)
    _settle_prefill_graphs(args, resolved, eager_model=eager_model)
    _keep_nccl_graph_mixing(resolved, args.dcp)
    page_size = resolved.page_size or 1
    set_config(args, dataclasses.replace(args.dcp, page_size=page_size))
    logical = page_size * args.dcp.dcp_size
    if resolved.device != "cpu" and logical & (logical - 1):
        raise DcpConfigError(
            f"--page-size {page_size} x --dcp-size {args.dcp.dcp_size} is {logical}: "
            "SGLang's GPU allocator needs a power of two; choose others"
        )
    api.declare(
        args,
        "dcp.logical_pages",
        page_size=logical,
        chunked_prefill_size=_align_chunk(resolved.chunked_prefill_size, logical),
    )


def _check_draft_model(args: Any, resolved: Any) -> None:
    """Raise `DcpConfigError` for a draft model that DCP does not support.

    Our hook checks each model config that SGLang reads. It would read this one first in
    the schedulers.
    """
    path = resolved.speculative_draft_model_path
    if not resolved.speculative_algorithm or path is None:
        return
    from sglang.srt.configs.model_config import ModelConfig

    from sglang_dcp.layers.heads import is_mla
    from sglang_dcp.support.backends import check_backend, requirement_of
    from sglang_dcp.support.kv_dtype import check_kv_dtype_of_checkpoint

    revision = resolved.speculative_draft_model_revision
    try:
        draft = ModelConfig.from_server_args(
            args, model_path=path, model_revision=revision, is_draft_model=True
        )
        need = requirement_of(resolved, draft, is_mla(draft))
        check_kv_dtype_of_checkpoint(resolved, need)
        check_backend(resolved.attention_backend, need)
    except DcpConfigError as error:
        raise DcpConfigError(
            f"--speculative-draft-model-path {path}: {error}"
        ) from None


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


def _check_replicas(config: DcpConfig, replicas: Replicas) -> None:
    """Raise if SGLang decided on other replicas of DP attention than the flags name."""
    if replicas.number != config.layout.replicas:
        raise DcpConfigError(
            f"SGLang chose {replicas.number} replicas of DP attention for this model, and "
            f"the flags name {config.layout.replicas}; name as many by {replicas.flag}"
        )


def mixes_captured_and_eager(args: Any, config: DcpConfig) -> bool:
    """Whether SGLang has groups that run captured and eager calls on one communicator.

    They are the groups of MoE and of DP attention that are not the whole tensor-parallel
    group. They have no PyNccl. `args` are resolved.
    """
    return args.ep_size not in (1, args.tp_size) or config.layout.replicas > 1


def _keep_nccl_graph_mixing(args: Any, config: DcpConfig) -> None:
    """Keep NCCL's default if groups mix captured and eager calls.

    SGLang sets the variable to 0 for every `dcp_size` above 1, unless it is set already.
    `scheduler._stop_nccl_graph_mixing` explains when 0 is safe.
    """
    if mixes_captured_and_eager(args, config):
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "1")
