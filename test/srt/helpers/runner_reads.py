"""What SGLang's attention backends read of a runner, by their source.

An inner backend is built on a `RunnerView`. All that it reads there must be right for one
rank's pool and for all heads of the DCP group. `runner_reads.toml` says of each read, for
each release, why it is. `source_reads.py` says what a read is.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Optional

from helpers.source_reads import Method, Source, Walk

LISTS = Path(__file__).with_suffix(".toml")
ATTENTION = "srt/layers/attention"
REGISTRY = f"{ATTENTION}/attention_registry.py"
# What hides further reads from us if a function that is not followed gets it.
HOLDERS = ("runner",) + tuple(
    f"runner.{name}"
    for name in (
        "kv_index_translator",
        "model_config",
        "model_config.hf_config",
        "model_config.hf_text_config",
        "ps",
        "req_to_token_pool",
        "server_args",
        "spec_algorithm",
        "token_to_kv_pool",
        "token_to_kv_pool_allocator",
    )
)
# What plans a forward, beside the constructor. Our own code calls the kernels.
PLANS = (
    "init_forward_metadata",
    "init_cuda_graph_state",
    "init_forward_metadata_out_graph",
    "init_forward_metadata_in_graph",
)


class Backend(NamedTuple):
    """A class of SGLang, and the function of its registry that builds it."""

    creator: str
    path: str
    name: str


def _backend(creator: str, module: str, name: str) -> Backend:
    return Backend(f"create_{creator}_backend", f"{ATTENTION}/{module}.py", name)


BACKENDS = {
    "triton": _backend("triton", "triton_backend", "TritonAttnBackend"),
    "flashinfer": _backend("flashinfer", "flashinfer_backend", "FlashInferAttnBackend"),
    "flashinfer_mla": _backend(
        "flashinfer", "flashinfer_mla_backend", "FlashInferMLAAttnBackend"
    ),
    "fa3": _backend(
        "flashattention_v3", "flashattention_backend", "FlashAttentionBackend"
    ),
}


@cache
def sglang_root() -> Path:
    """The folder of the installed `sglang` package."""
    spec = find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def reads_of(backend: Backend, root: Optional[Path] = None) -> set[str]:
    """All reads of a backend: when it is built, and when it plans a forward."""
    root = root or sglang_root()
    registry, source = Source(root / REGISTRY), Source(root / backend.path)
    walk = Walk(source, backend.name, HOLDERS)
    creator = registry.functions[backend.creator]
    walk.run(registry, creator, {creator.args.args[0].arg: {"runner"}})
    for name in PLANS:
        walk.call(Method(walk.built[0], name), {})
    return walk.reads


def judged(release: str) -> dict[str, dict[str, str]]:
    """By backend, the word for each read of a release. None of an unknown release."""
    backends = tomllib.loads(LISTS.read_text()).get(release, {})
    return {
        name: {read: word for word, reads in words.items() for read in reads}
        for name, words in backends.items()
    }


def complaint(name: str, release: str, found: set[str], listed: Iterable[str]) -> str:
    """What to do about reads of a backend that are not those listed; "" if they are."""
    new, gone = sorted(found - set(listed)), sorted(set(listed) - found)
    if not new and not gone:
        return ""
    return (
        f"SGLang {release}, {BACKENDS[name].path}: reads that nobody has judged: {new}; "
        f"listed, but not read: {gone}. Look up each new one. Is what it gives right for "
        "one rank's pool and all heads of the DCP group? A bound method does not see "
        "what RunnerView replaces. If it is wrong, replace it in layers/runner_view.py. "
        f'Then correct ["{release}".{name}] in {LISTS.name}.'
    )
