"""SGLang 0.5.23: server arguments are a sealed record, and decisions are declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_dcp.releases.api import SglangApi


class _Api(SglangApi):
    def resolved(self, server_args: Any) -> Any:
        from sglang.srt.arg_groups.overrides import resolving_view

        return resolving_view(server_args)

    def declare(self, server_args: Any, source: str, **fields: Any) -> None:
        from sglang.srt.arg_groups.overrides import declare_resolution

        declare_resolution(server_args, source, **fields)

    def model_config(self, server_args: Any) -> Any:
        from sglang.srt.arg_groups.overrides import model_config_of

        return model_config_of(server_args)

    def uses_mla(self, server_args: Any) -> bool:
        from sglang.srt.arg_groups.overrides import use_mla_backend

        return bool(use_mla_backend(server_args))

    def has_prefill_graph(self, server_args: Any) -> bool:
        from sglang.srt.model_executor.cuda_graph_config import Backend

        config = self.resolved(server_args).cuda_graph_config
        return bool(config.prefill.backend != Backend.DISABLED)

    def turn_off_prefill_graph(self, server_args: Any) -> bool:
        from sglang.srt.model_executor.cuda_graph_config import (
            Backend,
            Phase,
            with_phase,
        )

        if not self.has_prefill_graph(server_args):
            return False
        config = self.resolved(server_args).cuda_graph_config
        off = with_phase(config, Phase.PREFILL, backend=Backend.DISABLED)
        self.declare(server_args, "dcp.prefill_graph", cuda_graph_config=off)
        return True

    def hide_dcp_size(self, server_args: Any) -> None:
        """Do nothing: `dcp_size` was declared 1 before SGLang resolved anything."""

    def scheduler_tp_rank(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> int:
        from sglang.srt.runtime_context import get_parallel

        return int(get_parallel().tp_rank)

    def attention_replicas(self, server_args: Any) -> tuple[int, str]:
        # SGLang turns the old flags into the new one when it resolves them.
        if server_args.enable_dp_attention and server_args.attn_dp_size == 1:
            return server_args.dp_size, "--dp-size"
        return server_args.attn_dp_size, "--attn-dp-size"

    def binding_ranks(self, sizes: Mapping[str, int]) -> int:
        return sizes["world_size"]

    def group_options(self) -> dict[str, bool]:
        return {"use_mscclpp": False}

    def kv_indices_kernel(self) -> Any:
        from sglang.kernels.ops.attention.kv_indices import (
            create_flashinfer_kv_indices_triton,
        )

        return create_flashinfer_kv_indices_triton

    def cached_tokens(self, req: Any) -> int:
        return int(req.prefix_len)

    def attn_tp_partition(
        self, attn_tp_rank: int, attn_tp_size: int, dcp_size: int
    ) -> dict[str, Any]:
        from sglang.srt.layers.linear import ReplicatedParallelGroup

        # SGLang's group is that of all ranks that run attention for one batch.
        return {"parallel_group": ReplicatedParallelGroup("attn_tp", dcp_size)}

    def keep_quant_method_of_q_b(self, attention: Any) -> None:
        # None until the first forward, which decides by the weight that it finds.
        attention._use_min_latency_q_b_gemm = False


API = _Api()
