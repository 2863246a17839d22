"""SGLang 0.5.16: server arguments are a dataclass that holds what was resolved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_dcp.releases.api import SglangApi


class _Api(SglangApi):
    def resolved(self, server_args: Any) -> Any:
        return server_args

    def declare(self, server_args: Any, source: str, **fields: Any) -> None:
        server_args.override(source, **fields)

    def model_config(self, server_args: Any) -> Any:
        return server_args.get_model_config()

    def uses_mla(self, server_args: Any) -> bool:
        return bool(server_args.use_mla_backend())

    def has_prefill_graph(self, server_args: Any) -> bool:
        from sglang.srt.model_executor.cuda_graph_config import Backend

        return bool(server_args.cuda_graph_config.prefill.backend != Backend.DISABLED)

    def turn_off_prefill_graph(self, server_args: Any) -> bool:
        from sglang.srt.model_executor.cuda_graph_config import Backend

        was_on = self.has_prefill_graph(server_args)
        server_args.cuda_graph_config.prefill.backend = Backend.DISABLED
        return was_on

    def hide_dcp_size(self, server_args: Any) -> None:
        server_args.override("dcp.own_dcp_off", dcp_size=1)

    def scheduler_tp_rank(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> int:
        return int(args[0] if args else kwargs["tp_rank"])

    def attention_replicas(self, server_args: Any) -> tuple[int, str]:
        count = server_args.dp_size if server_args.enable_dp_attention else 1
        return count, "--dp-size"

    def binding_ranks(self, sizes: Mapping[str, int]) -> int:
        return sizes["tp_size"]

    def group_options(self) -> dict[str, bool]:
        return {"use_mscclpp_allreduce": False}

    def kv_indices_kernel(self) -> Any:
        from sglang.kernels.ops.kvcache.kv_indices import (
            create_flashinfer_kv_indices_triton,
        )

        return create_flashinfer_kv_indices_triton

    def cached_tokens(self, req: Any) -> int:
        return len(req.prefix_indices)

    def attn_tp_partition(
        self, attn_tp_rank: int, attn_tp_size: int, dcp_size: int
    ) -> dict[str, Any]:
        return {"tp_rank": attn_tp_rank, "tp_size": attn_tp_size}

    def keep_quant_method_of_q_b(self, attention: Any) -> None:
        attention.use_min_latency_q_b_gemm = False


API = _Api()
