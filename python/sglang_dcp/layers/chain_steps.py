"""Captured decode steps whose rows are the new tokens of one request: a chain.

A short prefill of one request has a row of a step for each new token, and each row reads the
prefix (`short_prefill.py`). As a chain the rows read it once, as more heads of one query, as
in a verification (`decode.py`). Only attention differs, so such a step is one more CUDA graph
of SGLang's decode runner, at some of its sizes. The rows that SGLang adds to a smaller step
come last in the chain, where no other row sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from sglang_dcp.layers.attention import DcpAttentionBackend

# Variants of SGLang's decode graphs. Those of chains are captured last, because their peak is
# the smaller one.
ROWS, CHAIN = "rows", "chain"
# Sizes of SGLang's decode graphs at which a chain is captured too. With fewer rows, each may
# read the prefix.
WIDTHS: tuple[int, ...] = (8, 12, 16, 24, 32, 40, 48, 56, 64)


class ChainSteps:
    """The chains of one `ModelRunner`, and which variant of a decode graph runs.

    It is what SGLang's decode runner calls `AttentionGraphVariants`.

    Parameters
    ----------
    make : Callable
        Builds the backend that attends to a chain of so many tokens.
    """

    capture_labels = (ROWS, CHAIN)

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

    def select(self, batch: Any) -> str:
        """Return the variant of the graph that SGLang replays for a batch."""
        return CHAIN if self.on else ROWS

    def capture(self, size: int, call: Callable[[], Any]) -> Any:
        """Capture the chain of `size` tokens by `call`, if there is one."""
        if size not in WIDTHS:
            return None
        with self.running():
            captured = call()
        self._captured.add(size)
        return captured


def chains_of(graphs: Any) -> Optional[ChainSteps]:
    """Return the chains of SGLang's `DecodeCudaGraphRunner`, if it can capture them.

    A graph of SGLang's own that prepares the attention of a replay does not know variants.
    """
    chains = getattr(graphs.attn_backend, "chains", None)
    if chains is None or graphs._metadata_glue is not None:
        return None
    return chains if graphs.attention_graph_variants in (None, chains) else None


def capture_all(
    original: Callable[..., Any], graphs: Any, *args: Any, **kw: Any
) -> Any:
    """Hook: `DecodeCudaGraphRunner._capture_one_stream`; adds the variant of chains."""
    chains = chains_of(graphs)
    if chains is not None:
        graphs.attention_graph_variants = chains
    return original(graphs, *args, **kw)


def capture_size(
    original: Callable[..., Any], graphs: Any, size: int, *args: Any, **kw: Any
) -> Any:
    """Hook: `DecodeCudaGraphRunner.capture_one_shape`; captures chains where they are."""
    chains = chains_of(graphs)
    if chains is None:
        return original(graphs, size, *args, **kw)
    from sglang.srt.model_executor.runner_utils.capture_mode import (
        get_capture_attention_variant,
    )

    if get_capture_attention_variant() != CHAIN:
        return original(graphs, size, *args, **kw)
    return chains.capture(size, lambda: original(graphs, size, *args, **kw))
