"""The attention backends of a draft model that proposes a chain, one for each step.

The draft model has K/V of its own, in a pool that is sharded as the target's is. SGLang
plans all steps before the first one runs. So each step has plans of its own, over the
local table and the exchange that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

from sglang_dcp.layers.attention import DcpAttentionBackend
from sglang_dcp.layers.decode_rows import as_draft_step

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class DraftSteps:
    """What SGLang calls a multi-step draft backend.

    Attributes
    ----------
    attn_backends : list of DcpAttentionBackend
        Entry i serves step i. SGLang runs one step less than it proposes tokens.
    needs_cpu_seq_lens : bool
        Lengths are planned on the host.
    """

    needs_cpu_seq_lens = True
    # SGLang asks wrapped backends for these.
    forward_metadata: Optional[object] = None
    prefill_attention_backend_str: Optional[str] = None
    decode_attention_backend_str: Optional[str] = None

    def __init__(self, backends: Sequence[DcpAttentionBackend]) -> None:
        self.attn_backends = list(backends)

    @classmethod
    def for_runner(cls, runner: Any, steps: int) -> DraftSteps:
        """Build beside the backend of the draft model's runner, for `steps` tokens."""
        base: DcpAttentionBackend = runner.attn_backend
        inner = type(base.backend)
        found = [
            DcpAttentionBackend.for_runner(inner, runner, base)
            for _ in range(steps - 1)
        ]
        for backend in found:
            backend.prefill_attention_backend_str = base.prefill_attention_backend_str
            backend.decode_attention_backend_str = base.decode_attention_backend_str
        return cls(found)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan every step of an eager draft."""
        for step, backend in enumerate(self.attn_backends):
            backend.init_forward_metadata(as_draft_step(forward_batch, step))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured steps read, before the first capture."""
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_bs)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Refresh what the captured steps read, outside the graph."""
        for step, backend in enumerate(self.attn_backends):
            one = as_draft_step(forward_batch, step)
            backend.init_forward_metadata_out_graph(one, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Do nothing: every plan is made outside the graph."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of padding rows."""
        return self.attn_backends[0].get_cuda_graph_seq_len_fill_value()
