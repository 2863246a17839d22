"""Captured decode steps whose rows are the new tokens of one request: a chain.

A short prefill of one request has a row of a step for each new token, and each row reads the
prefix (`short_prefill.py`). As a chain the rows read it once, as more heads of one query, as
in a verification (`decode.py`). Only attention differs, so such a step is one more CUDA graph
of SGLang's decode runner, at some of its sizes. The rows that SGLang adds to a smaller step
come last in the chain, where no other row sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from sglang_dcp.layers.attention import DcpAttentionBackend

# What tells the graph of a chain from the one of the same size that SGLang captures.
CHAIN = "chain"
# Sizes of SGLang's decode graphs at which a chain is captured too. With fewer rows, each may
# read the prefix.
WIDTHS: tuple[int, ...] = (8, 12, 16, 24, 32, 40, 48, 56, 64)


class ChainSteps:
    """The chains of one `ModelRunner`, and whether its decode steps are chains now.

    Parameters
    ----------
    make : Callable
        Builds the backend that attends to a chain of so many tokens.

    Attributes
    ----------
    on : bool
        Whether decode steps are chains.
    """

    def __init__(self, make: Callable[[int], DcpAttentionBackend]) -> None:
        self._make = make
        self._backends: dict[int, DcpAttentionBackend] = {}
        self._captured: set[int] = set()
        self.on = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, decode steps of this process are chains."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def backend_of(self, width: int) -> DcpAttentionBackend:
        """Return the backend of a chain of `width` tokens, built when it is first asked."""
        if width not in self._backends:
            self._backends[width] = self._make(width)
        return self._backends[width]

    def init_graphs(self, most: int) -> None:
        """Allocate what captured chains read, of at most `most` tokens."""
        for width in WIDTHS:
            if width <= most:
                self.backend_of(width).init_cuda_graph_state(1, width)

    def serves(self, size: int, *, captured: bool) -> bool:
        """Whether a step of `size` rows can be a chain, in its CUDA graph or eagerly."""
        return size in (self._captured if captured else WIDTHS)

    def variant(self, *asked: Any) -> Optional[str]:
        """Return which graph of its size SGLang's runner replays, if it is not its own.

        It stands for `_resolve_attention_variant` of that runner, whose arguments do not
        matter here.
        """
        return CHAIN if self.on else None

    def capture(self, size: int, call: Callable[[], Any]) -> None:
        """Capture the chain of `size` tokens by `call`, if there is one."""
        if size not in WIDTHS:
            return
        with self.running():
            call()
        self._captured.add(size)


def chains_of(graphs: Any) -> Optional[ChainSteps]:
    """Return the chains of SGLang's `DecodeCudaGraphRunner`, if it can capture them.

    A graph of SGLang's own that prepares the attention of a replay does not know variants.
    """
    chains: Optional[ChainSteps] = getattr(graphs.attn_backend, "chains", None)
    if chains is None:
        return None
    other = graphs.attention_graph_variants or graphs._metadata_glue
    return chains if other is None else None


def capture_size(
    original: Callable[..., Any], graphs: Any, size: int, *args: Any, **kw: Any
) -> Any:
    """Hook: `DecodeCudaGraphRunner.capture_one_shape`; captures a chain beside the rows."""
    captured = original(graphs, size, *args, **kw)
    chains = chains_of(graphs)
    if chains is not None:
        graphs._resolve_attention_variant = chains.variant
        given = inspect.signature(original).bind(graphs, size, *args, **kw)
        given.arguments["attention_variant"] = CHAIN
        chains.capture(size, lambda: original(*given.args, **given.kwargs))
    return captured
