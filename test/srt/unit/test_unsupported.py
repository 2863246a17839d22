"""Every combination that does not work with DCP is refused, by name, before it starts.

Only this file catches a table entry that never fires: each entry must be the first to
reject one case here, so an entry without a case fails. Entries and cases are those of
the installed release of SGLang, by the range of the entry.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.environ import envs
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
from sglang.srt.server_args import ServerArgs

from helpers.quantized import FORMATS
from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers.backends.capabilities import FP8, Requirement
from sglang_dcp.layers.backends.registry import backend_names, backends
from sglang_dcp.releases.api import sglang_api
from sglang_dcp.releases.installed import in_range, sglang_version
from sglang_dcp.support import speculation
from sglang_dcp.support.architectures import (
    DP_ATTENTION,
    DRAFT_ARCHITECTURES,
    LOADED_AS_LLAMA,
    NORMS_OVER_HEADS,
    ONE_RANK_IN_SGLANG,
    served,
)
from sglang_dcp.support.backends import check_backend, default_backend
from sglang_dcp.support.experts import (
    UNSUPPORTED_EXPERTS,
    check_experts,
    check_experts_of,
)
from sglang_dcp.support.models import UNSUPPORTED_MODELS, check_model
from sglang_dcp.support.quantization import (
    CUTS_BY_RANK,
    LOADS_RIGHT,
    OTHER_DEVICES,
    check_replicated_q,
)
from sglang_dcp.support.quantized_layers import packed_latents
from sglang_dcp.support.rules import Unsupported, rules_in_force
from sglang_dcp.support.server import UNSUPPORTED_SERVER_ARGS, check_server_args

IN_FORCE = rules_in_force(UNSUPPORTED_SERVER_ARGS)
# Before any plugin replaces the class: SGLang's own fields.
FIELDS = frozenset(inspect.signature(ServerArgs).parameters)

FINE_SERVER = dict(
    device="cpu",
    page_size=None,
    context_length=None,
    max_total_tokens=None,
    load_format="auto",
    weight_cache_mode="off",
    startup_weight_load_mode="serial",
    quantization_param_path=None,
    enable_symm_mem=False,
    debug_cuda_graph=False,
    cuda_graph_backend_decode=None,
    cuda_graph_config=None,
    enable_nvidia_megakernel=False,
    enable_flexkv=False,
    remote_instance_weight_loader_start_seed_via_transfer_engine=False,
    radix_cache_backend=None,
    enable_torch_compile=False,
    enable_deterministic_inference=False,
    model_impl="auto",
    moe_a2a_backend="none",
    moe_dense_tp_size=None,
    enable_attn_tp_input_scattered=False,
    enable_single_batch_overlap=False,
    torchao_config="",
    cpu_offload_gb=0,
    offload_group_size=-1,
    enable_layernorm_sp=False,
    enable_mis=False,
    speculative_algorithm=None,
    speculative_eagle_topk=None,
    speculative_ngram_max_bfs_breadth=10,
    speculative_ngram_external_sam_budget=0,
    speculative_adaptive=False,
    enable_multi_layer_eagle=False,
    speculative_draft_window_size=None,
    speculative_draft_attention_backend=None,
    speculative_draft_kv_cache_dtype=None,
    speculative_draft_load_format=None,
    speculative_moe_a2a_backend=None,
    enable_return_aux_hidden_states=False,
    disaggregation_mode="null",
    enable_kv_cache_sharding=False,
    enable_hierarchical_cache=False,
    enable_unified_cache_external_linker=False,
    enable_lmcache=False,
    enable_unified_memory=False,
    enable_hisparse=False,
    enable_page_major_kv_layout=False,
    prefill_only_disable_kv_cache=False,
    kv_cache_dtype="auto",
    attn_cp_size=1,
    enable_prefill_cp=False,
    enable_dp_attention=False,
    dwdp_size=1,
    attn_dp_size=1,
    pp_size=1,
    nnodes=1,
    node_rank=0,
    dist_init_addr=None,
    enable_lora=None,
    lora_paths=None,
    lora_backend="csgmv",
    enable_two_batch_overlap=False,
    enable_pdmux=False,
    dllm_algorithm=None,
    kv_canary="none",
    dcp=DcpConfig(Layout(4, 2)),
    elastic_ep_backend=None,
    use_ray=False,
    forward_hooks=None,
    attention_backend="torch_native",
    prefill_attention_backend=None,
    decode_attention_backend=None,
)

REPLICATE = {"dcp_replicate_q_proj": True}
REPLICATED = DcpConfig(Layout(4, 2), replicate_q_proj=True)

# As if their servers had been compared.
ALGORITHMS = ("EAGLE", "NGRAM", "STANDALONE")


def speculating(**changes: Any) -> dict[str, Any]:
    return {"speculative_algorithm": "STANDALONE", **changes}


# Flag, the changed server argument, and what the message shows after the flag.
SERVER_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "--page-size": ({"page_size": -1}, " -1"),
    "--context-length": ({"context_length": 0}, " 0"),
    "--max-total-tokens": ({"max_total_tokens": -5}, " -5"),
    "--device": ({"device": "xpu"}, " xpu"),
    "--load-format": ({"load_format": LoadFormat.SHARDED_STATE}, " sharded_state"),
    "--weight-cache-mode": ({"weight_cache_mode": "client"}, " client"),
    "--startup-weight-load-mode": (
        {
            "startup_weight_load_mode": "overlap",
            "dcp": REPLICATED,
        },
        " overlap",
    ),
    "--quantization-param-path": ({"quantization_param_path": "kv.json"}, " kv.json"),
    "--enable-symm-mem": ({"enable_symm_mem": True}, ""),
    "--debug-cuda-graph": ({"debug_cuda_graph": True}, ""),
    "--cuda-graph-backend-decode": (
        {"cuda_graph_backend_decode": "tc_piecewise"},
        " tc_piecewise",
    ),
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": ({}, " 1"),
    "--enable-nvidia-megakernel": ({"enable_nvidia_megakernel": True}, ""),
    "--enable-flexkv": ({"enable_flexkv": True}, ""),
    "--remote-instance-weight-loader-start-seed-via-transfer-engine": (
        {"remote_instance_weight_loader_start_seed_via_transfer_engine": True},
        "",
    ),
    "--radix-cache-backend": ({"radix_cache_backend": "mine"}, " mine"),
    "--enable-torch-compile": ({"enable_torch_compile": True}, ""),
    "--enable-deterministic-inference": ({"enable_deterministic_inference": True}, ""),
    "--model-impl": ({"model_impl": "transformers"}, " transformers"),
    "--torchao-config": (
        {"torchao_config": "int4wo-128", "dcp": REPLICATED, "device": "cuda"},
        " int4wo-128",
    ),
    "--cpu-offload-gb": ({"cpu_offload_gb": 4, "dcp": REPLICATED}, " 4"),
    "--enable-layernorm-sp": (
        {"enable_layernorm_sp": True, "dcp": REPLICATED},
        "",
    ),
    "--enable-mis": ({"enable_mis": True}, ""),
    "--speculative-algorithm": ({"speculative_algorithm": "EAGLE"}, " EAGLE"),
    "--speculative-eagle-topk": (speculating(speculative_eagle_topk=4), " 4"),
    "--speculative-ngram-max-bfs-breadth": (
        {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 10},
        " 10",
    ),
    "--speculative-ngram-external-sam-budget": (
        {
            "speculative_algorithm": "NGRAM",
            "speculative_ngram_max_bfs_breadth": 1,
            "speculative_ngram_external_sam_budget": 2,
        },
        " 2",
    ),
    "--attn-dp-size": (speculating(attn_dp_size=2), " 2"),
    "--speculative-adaptive": (speculating(speculative_adaptive=True), ""),
    "--enable-multi-layer-eagle": (speculating(enable_multi_layer_eagle=True), ""),
    "--speculative-draft-window-size": (
        speculating(speculative_draft_window_size=64),
        " 64",
    ),
    "--speculative-draft-attention-backend": (
        speculating(speculative_draft_attention_backend="triton"),
        " triton",
    ),
    "--speculative-draft-kv-cache-dtype": (
        speculating(speculative_draft_kv_cache_dtype="fp8_e4m3"),
        " fp8_e4m3",
    ),
    "--speculative-draft-load-format": (
        speculating(speculative_draft_load_format="sharded_state"),
        " sharded_state",
    ),
    "--speculative-moe-a2a-backend": (
        speculating(speculative_moe_a2a_backend="deepep"),
        " deepep",
    ),
    "--disaggregation-mode": ({"disaggregation_mode": "decode"}, " decode"),
    "--enable-kv-cache-sharding": ({"enable_kv_cache_sharding": True}, ""),
    "--enable-hierarchical-cache": ({"enable_hierarchical_cache": True}, ""),
    "--enable-unified-cache-external-linker": (
        {"enable_unified_cache_external_linker": True},
        "",
    ),
    "--enable-lmcache": ({"enable_lmcache": True}, ""),
    "--enable-unified-memory": ({"enable_unified_memory": True}, ""),
    "--enable-hisparse": ({"enable_hisparse": True}, ""),
    "--enable-page-major-kv-layout": ({"enable_page_major_kv_layout": True}, ""),
    "--prefill-only-disable-kv-cache": ({"prefill_only_disable_kv_cache": True}, ""),
    "--kv-cache-dtype": ({"kv_cache_dtype": "fp8_e5m2"}, " fp8_e5m2"),
    "--attention-context-parallel-size": ({"attn_cp_size": 2}, " 2"),
    "--enable-prefill-cp": ({"enable_prefill_cp": True}, ""),
    # SGLang declares the other size when it resolves this one.
    "--dwdp-size": ({"dwdp_size": 4, "attn_dp_size": 4}, " 4"),
    "--pp-size": ({"pp_size": 2}, " 2"),
    "--nnodes": ({"nnodes": 2}, " 2 without --dist-init-addr"),
    "--node-rank": (
        {"nnodes": 2, "node_rank": 2, "dist_init_addr": "a:1"},
        " 2 of --nnodes 2",
    ),
    "--enable-lora": (
        {"enable_lora": True, "dcp": REPLICATED},
        " with --dcp-replicate-q-proj",
    ),
    "--lora-paths": (
        {"lora_paths": ["a=/b"], "dcp": REPLICATED},
        " with --dcp-replicate-q-proj",
    ),
    "--lora-backend": ({"enable_lora": True}, " csgmv on a CPU"),
    "--enable-two-batch-overlap": ({"enable_two_batch_overlap": True}, ""),
    "--enable-pdmux": ({"enable_pdmux": True}, ""),
    "--dllm-algorithm": ({"dllm_algorithm": "LowConfidence"}, " LowConfidence"),
    "--kv-canary": ({"kv_canary": "raise"}, " raise"),
    "--elastic-ep-backend": ({"elastic_ep_backend": "mooncake"}, " mooncake"),
    "--use-ray": ({"use_ray": True}, ""),
    "--forward-hooks": (
        {"forward_hooks": [{"name": "mine"}], "dcp": REPLICATED},
        " with --dcp-replicate-q-proj",
    ),
    "SGLANG_EXTERNAL_MODEL_PACKAGE": ({}, " 1"),
    "SGLANG_USE_HND_KVCACHE": ({}, " 1"),
}
CASES = {
    flag: case
    for flag, case in SERVER_CASES.items()
    if flag in {rule.flag for rule in IN_FORCE}
}


def fine_server(**changes: Any) -> SimpleNamespace:
    """Server arguments that DCP serves. It has no field that the release lacks."""
    fine = {
        name: value
        for name, value in FINE_SERVER.items()
        if name in FIELDS or name == "dcp"
    }
    assert set(changes) <= set(fine)
    return SimpleNamespace(**{**fine, **changes})


def since(release_field: str) -> pytest.MarkDecorator:
    """For a test of an argument that only one of the releases has."""
    return pytest.mark.skipif(
        release_field not in FIELDS, reason=f"this SGLang has no {release_field}"
    )


def fine_model(**changes: Any) -> SimpleNamespace:
    """The part of `ModelConfig` that is read, of a model with 8 heads and 2 K/V heads."""
    text = dict(num_attention_heads=8, layer_types=None, sliding_window=None)
    text.update(num_hidden_layers=2)
    text.update(changes.pop("text", {}))
    kv_heads = changes.pop("kv_heads", 2)
    architecture = changes.pop("architecture", "LlamaForCausalLM")
    fields = dict(
        has_attention_sinks=False,
        is_hybrid_swa=False,
        is_encoder_decoder=False,
        is_draft_model=False,
        attention_arch=AttentionArch.MHA,
        quantization=None,
        context_len=8192,
        hf_text_config=SimpleNamespace(**text),
        hf_config=SimpleNamespace(
            architectures=[architecture],
            quantization_config=changes.pop("quantization_config", None),
        ),
        get_total_num_kv_heads=lambda: kv_heads,
    )
    return SimpleNamespace(**{**fields, **changes})


MODEL_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "encoder-decoder": (
        {"is_encoder_decoder": True},
        "LlamaForCausalLM (cross attention)",
    ),
    "sinks": ({"has_attention_sinks": True}, "LlamaForCausalLM (attention sinks)"),
    "hybrid-swa": (
        {"is_hybrid_swa": True},
        "LlamaForCausalLM (sliding window layers)",
    ),
    "swa-layer": (
        {"text": {"layer_types": ["full_attention", "sliding_attention"]}},
        "LlamaForCausalLM (sliding window layers)",
    ),
    "swa-mistral": (
        {"text": {"sliding_window": 4096}},
        "LlamaForCausalLM (sliding_window 4096)",
    ),
    "dsa": (
        {"architecture": "DeepseekV32ForCausalLM", "text": {"index_topk": 2048}},
        "DeepseekV32ForCausalLM (index_topk 2048)",
    ),
    "dense-layers": (
        {"architecture": "Qwen3MoeForCausalLM", "text": {"mlp_only_layers": [0, 3]}},
        "Qwen3MoeForCausalLM (mlp_only_layers [0, 3])",
    ),
    "dense-layers-of-qwen2": (
        {"architecture": "Qwen2MoeForCausalLM", "text": {"mlp_only_layers": [0]}},
        "Qwen2MoeForCausalLM (mlp_only_layers [0])",
    ),
    "dense-steps": (
        {"architecture": "Qwen3MoeForCausalLM", "text": {"decoder_sparse_step": 2}},
        "Qwen3MoeForCausalLM (decoder_sparse_step 2)",
    ),
    "fp8-blocks-of-llama": (
        {
            "quantization": "fp8",
            "quantization_config": {"weight_block_size": [128, 64]},
        },
        "LlamaForCausalLM (weight_block_size [128, 64])",
    ),
    "bitsandbytes": (
        {"quantization": "bitsandbytes"},
        "LlamaForCausalLM (bitsandbytes)",
    ),
    "other-devices": ({"quantization": "modelslim"}, "LlamaForCausalLM (modelslim)"),
    "packed-latents": (
        {
            "architecture": "DeepseekV3ForCausalLM",
            "attention_arch": AttentionArch.MLA,
            "quantization": "gptq_marlin",
            "quantization_config": {"quant_method": "gptq", "bits": 4},
        },
        "DeepseekV3ForCausalLM (gptq_marlin kv_b_proj)",
    ),
    "int8-experts": (
        {
            "architecture": "Qwen3MoeForCausalLM",
            "quantization": "compressed-tensors",
            "quantization_config": FORMATS["int8-channel"].config,
            "text": {"num_experts": 8},
        },
        "Qwen3MoeForCausalLM (INT8 experts)",
    ),
    "mlp-bias": ({"text": {"mlp_bias": True}}, "LlamaForCausalLM (mlp_bias)"),
    "scaled-queries": (
        {"text": {"llama_4_scaling": {"beta": 0.1}}},
        "LlamaForCausalLM (llama_4_scaling)",
    ),
    "architecture": ({"architecture": "GptOssForCausalLM"}, "GptOssForCausalLM"),
    "layer-kinds": (
        {"text": {"layer_types": ["full_attention", "chunked_attention"]}},
        "LlamaForCausalLM (layer_types chunked_attention)",
    ),
    **{name: ({"architecture": name}, name) for name in ONE_RANK_IN_SGLANG},
}
CONFIG = DcpConfig(Layout(4, 2))


def first_to_speak(table: tuple[Unsupported, ...], subject: Any) -> Unsupported:
    return next(entry for entry in table if entry.value(subject) is not None)


def server_subject(flag: str, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    if flag.startswith("SGLANG_"):
        monkeypatch.setenv(flag, "1")
    if "specul" in str(CASES[flag]) and flag != "--speculative-algorithm":
        monkeypatch.setattr(speculation, "SERVED_ON_CPU", ALGORITHMS)
    return fine_server(**CASES[flag][0])


def test_each_server_entry_has_a_case() -> None:
    assert {entry.flag for entry in UNSUPPORTED_SERVER_ARGS} == set(SERVER_CASES)
    flags = [entry.flag for entry in IN_FORCE]
    assert {*flags} == {*CASES}
    # The second of each has a test of its own. Only 0.5.16 has two of --load-format.
    twice = {flag for flag in flags if flags.count(flag) > 1}
    assert twice <= {"--load-format", "--enable-lora", "--lora-paths"}


def fields_of(rule: Unsupported) -> set[str]:
    """The arguments that a rule reads of a server which it does not refuse."""
    read = set()

    class Noted:
        def __getattr__(self, name: str) -> Any:
            read.add(name)
            return FINE_SERVER[name]

    assert rule.value(Noted()) is None
    return read


def test_each_server_entry_is_in_force_where_its_arguments_exist() -> None:
    """Or another entry of the same flag is. So no range can be wrong on a new release."""
    flags = {rule.flag for rule in IN_FORCE}
    for rule in UNSUPPORTED_SERVER_ARGS:
        if rule.flag.startswith("SGLANG_"):
            exists = hasattr(envs, rule.flag)
        else:
            assert (read := fields_of(rule)), rule.flag
            exists = read <= FIELDS
        assert exists == (rule in IN_FORCE) or (exists and rule.flag in flags), rule


@pytest.mark.parametrize("rule", IN_FORCE, ids=lambda rule: rule.flag)
def test_an_argument_that_is_none_is_not_refused(rule: Unsupported) -> None:
    """Before SGLang resolves its arguments, many are None that have a value later."""
    if not rule.flag.startswith("SGLANG_"):
        assert rule.value(fine_server(**dict.fromkeys(fields_of(rule)))) is None


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        pytest.param(
            DcpConfig(Layout(16, 1), "symm_a2a"),
            "cuda",
            "--dcp-comm-backend symm_a2a serves up to 8 DCP ranks, not 16; use a2a",
            id="too-many-ranks",
        ),
        pytest.param(
            DcpConfig(Layout(4, 2), "symm_a2a"),
            "cpu",
            "--dcp-comm-backend symm_a2a does not .* other NVIDIA GPUs; use .* ag_rs",
            id="needs-a-gpu",
        ),
        pytest.param(
            DcpConfig(Layout(4, 2), "nccl"),
            "cpu",
            "--dcp-comm-backend nccl is unknown; use one of ag_rs, a2a, symm_a2a",
            id="unknown",
        ),
        pytest.param(
            DcpConfig(Layout(4, 2), "fi_a2a"),
            "cuda",
            "--dcp-comm-backend fi_a2a does not .*MNNVL.*; use --dcp-comm-backend a2a",
            id="sglangs-third",
        ),
    ],
)
def test_comm_backend(config: DcpConfig, device: str, message: str) -> None:
    changes = {"dcp": config, "device": device, "attention_backend": None}
    with pytest.raises(DcpConfigError, match=message):
        check_server_args(fine_server(**changes))


def test_an_unknown_comm_backend_is_named_without_dcp_too(server_args: Any) -> None:
    with pytest.raises(DcpConfigError, match="--dcp-comm-backend nccl is unknown"):
        server_args(dcp_comm_backend="nccl")


@pytest.mark.parametrize(
    "changes",
    [
        {"load_format": "remote"},
        {"load_format": "remote_instance"},
        {"load_format": "presharded"},
        {"load_format": "bitsandbytes"},
        {"device": "npu"},
    ],
    ids=str,
)
def test_other_values_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DcpConfigError, match=next(iter(changes.values()))):
        check_server_args(fine_server(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"load_format": LoadFormat.DUMMY},
        {"cuda_graph_backend_decode": "full"},
        {"cuda_graph_backend_decode": "breakable"},
        {"cuda_graph_config": {"decode": {"backend": "breakable"}}},
        {"enable_single_batch_overlap": True},
        {"cpu_offload_gb": 4},
        {"offload_group_size": 2},
        {"moe_dense_tp_size": 1},
        {"enable_attn_tp_input_scattered": True},
        {"enable_dp_attention": True},
        {"moe_a2a_backend": "deepep", "device": "cuda"},
        {"moe_a2a_backend": "nixl", "device": "cuda"},
        {"moe_a2a_backend": "megamoe", "device": "cuda"},
        {"cuda_graph_backend_decode": "disabled"},
        {"cuda_graph_config": {"prefill": {"backend": "breakable"}}},
        {"cuda_graph_config": CudaGraphConfig()},
        {"enable_lora": False, "lora_paths": ["a=/b"], "dcp": REPLICATED},
        {"enable_lora": True, "lora_backend": "torch_native"},
        {"forward_hooks": [{"name": "mine"}]},
        {"lora_paths": {"a": "/b"}, "lora_backend": "torch_native"},
        {"nnodes": 2, "node_rank": 1, "dist_init_addr": "a:1"},
    ],
    ids=str,
)
def test_values_beside_refused_ones(changes: dict[str, Any]) -> None:
    check_server_args(fine_server(**changes))


@pytest.mark.skipif(
    in_range(sglang_version(), "0.5.23", None), reason="SGLang itself refuses it there"
)
@pytest.mark.parametrize("resolved", [False, True])
def test_a_decode_graph_that_the_json_names(resolved: bool) -> None:
    """SGLang lets it win over the flag, and resolves both into one object."""
    config: Any = {"decode": {"backend": "tc_piecewise"}}
    if resolved:
        config = CudaGraphConfig.from_dict(config)
    args = fine_server(cuda_graph_backend_decode="full", cuda_graph_config=config)
    with pytest.raises(
        DcpConfigError, match="--cuda-graph-backend-decode tc_piecewise"
    ):
        check_server_args(args)


@since("torchao_config")
@pytest.mark.parametrize("changes", [{"dcp": REPLICATED}, {"device": "cuda"}], ids=str)
def test_torchao_is_refused_beside_replicated_q_on_gpus(
    changes: dict[str, Any],
) -> None:
    args = fine_server(torchao_config="int8wo", attention_backend=None, **changes)
    check_server_args(args)


@since("torchao_config")
def test_updates_whose_scales_are_cut_by_rank() -> None:
    """0.5.16 alone: later releases take new weights through the layers' own loaders."""
    with pytest.raises(DcpConfigError, match="--load-format flash_rl .* scales of K/V"):
        check_server_args(fine_server(load_format="flash_rl"))


@since("startup_weight_load_mode")
def test_late_weights_without_replicated_q() -> None:
    check_server_args(fine_server(startup_weight_load_mode="overlap"))


@since("enable_return_aux_hidden_states")
def test_an_algorithm_that_only_names_a_capture_of_hidden_states() -> None:
    changes = {"speculative_algorithm": "EAGLE3"}
    check_server_args(fine_server(enable_return_aux_hidden_states=True, **changes))


@since("enable_return_aux_hidden_states")
@pytest.mark.parametrize("name", ["EAGLE", "EAGLE3", "NEXTN", "ngram", "STANDALONE"])
def test_no_algorithm_is_served_on_a_cpu(name: str) -> None:
    with pytest.raises(DcpConfigError, match=f"^--speculative-algorithm {name} does"):
        check_server_args(fine_server(speculative_algorithm=name))


@since("enable_return_aux_hidden_states")
@pytest.mark.parametrize(
    "changes",
    [
        speculating(speculative_eagle_topk=1),
        speculating(speculative_draft_load_format="auto"),
        {"speculative_algorithm": "NEXTN", "speculative_eagle_topk": 1},
        {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1},
    ],
    ids=str,
)
def test_chains_would_be_served(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of algorithms whose servers have been compared."""
    monkeypatch.setattr(speculation, "SERVED_ON_CPU", ALGORITHMS)
    check_server_args(fine_server(**changes))
    with pytest.raises(DcpConfigError, match="--speculative-algorithm DFLASH does"):
        check_server_args(fine_server(speculative_algorithm="DFLASH"))


@since("enable_return_aux_hidden_states")
def test_gpus_speculate_with_algorithms_that_were_compared() -> None:
    ngram = {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1}
    eagle = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1}
    for changes in (ngram, eagle, speculating()):
        on_gpu = fine_server(device="cuda", attention_backend="fa3", **changes)
        check_server_args(on_gpu)
        with pytest.raises(DcpConfigError, match="--speculative-algorithm .*compared"):
            check_server_args(fine_server(**changes))


@since("enable_return_aux_hidden_states")
@pytest.mark.parametrize(
    "adapters", [{"enable_lora": True}, {"lora_paths": ["a=/b"]}], ids=str
)
def test_adapters_beside_speculation(adapters: dict[str, Any]) -> None:
    flag = "--" + next(iter(adapters)).replace("_", "-")
    on_gpu: dict[str, Any] = dict(device="cuda", attention_backend="fa3", **adapters)
    check_server_args(fine_server(**on_gpu))
    for changes in (
        {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1},
        {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1},
    ):
        shown = (
            f"^{flag} with --speculative-algorithm {changes['speculative_algorithm']} "
        )
        with pytest.raises(DcpConfigError, match=shown + "does .*compared with tp 1"):
            check_server_args(fine_server(**on_gpu, **changes))
    captures = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1}
    named = fine_server(**on_gpu, **captures, enable_return_aux_hidden_states=True)
    check_server_args(named)


@pytest.mark.parametrize("name", DRAFT_ARCHITECTURES)
def test_a_draft_architecture_is_no_model_to_serve(name: str) -> None:
    check_model(fine_model(architecture=name, is_draft_model=True), CONFIG)
    with pytest.raises(DcpConfigError, match=f"--model-path {name} does not work"):
        check_model(fine_model(architecture=name), CONFIG)


A2A = "--moe-a2a-backend"
IN_REPLICAS = DcpConfig(Layout(2, 1, replicas=2))
# What the message shows, for each rule in its order.
EXPERT_CASES: dict[str, dict[str, Any]] = {
    f"{A2A} flashinfer does not .* one rank; use .* deepep": {
        "moe_a2a_backend": "flashinfer",
        "device": "cuda",
    },
    f"{A2A} mori does not .*AMD": {"moe_a2a_backend": "mori", "device": "cuda"},
    f"{A2A} customized does not .*another plugin": {
        "moe_a2a_backend": "customized",
        "device": "cuda",
    },
    f"{A2A} mooncake does not .*elastic EP": {
        "moe_a2a_backend": "mooncake",
        "device": "cuda",
    },
    f"{A2A} deepep on a CPU does not .*none": {"moe_a2a_backend": "deepep"},
    "--speculative-algorithm EAGLE with scattered tokens does not .*padding": {
        "speculative_algorithm": "EAGLE",
        "moe_dense_tp_size": 1,
    },
    "--enable-dp-attention does not .*first request.*0.5.23": {"dcp": IN_REPLICAS},
}


@pytest.mark.parametrize(
    ("rule", "message"),
    zip(UNSUPPORTED_EXPERTS, EXPERT_CASES, strict=True),
    ids=lambda value: value.split(" does")[0] if isinstance(value, str) else "",
)
def test_experts_of_replicas(rule: Unsupported, message: str) -> None:
    args = fine_server(attention_backend=None, **EXPERT_CASES[message])
    if rule not in rules_in_force(UNSUPPORTED_EXPERTS):
        check_experts(args)
        return
    assert first_to_speak(rules_in_force(UNSUPPORTED_EXPERTS), args) is rule
    with pytest.raises(DcpConfigError, match=message):
        check_experts(args)


@pytest.mark.parametrize(
    "adapters", [{"enable_lora": True}, {"lora_paths": ["a=/b"]}], ids=str
)
def test_adapters_of_replicas(adapters: dict[str, Any]) -> None:
    flag = "--" + next(iter(adapters)).replace("_", "-")
    args = fine_server(lora_backend="torch_native", dcp=IN_REPLICAS, **adapters)
    with pytest.raises(DcpConfigError, match=f"^{flag} with DP attention does .*one r"):
        check_server_args(args)


def test_each_exchange_of_tokens_is_decided_upon() -> None:
    """A release may bring another one, which nobody has read."""
    from sglang.srt.layers.moe.utils import MoeA2ABackend

    served = {"none", "deepep", "deepep_v2", "nixl", "megamoe", "pplx"}
    if in_range(sglang_version(), "0.5.23", None):
        served.add("mooncake")
    for name in (member.value for member in MoeA2ABackend):
        args = fine_server(moe_a2a_backend=name, device="cuda", attention_backend=None)
        if name in served:
            check_server_args(args)
            continue
        with pytest.raises(DcpConfigError, match=f"{A2A} {name} does not work"):
            check_server_args(args)


@pytest.mark.parametrize("name", served())
def test_models_of_replicas_and_of_exchanged_tokens(name: str) -> None:
    """SGLang splits these models' attention, and scatters their tokens, and no others'."""
    model = fine_model(architecture=name)
    check_model(model, CONFIG)
    none, deepep = (
        fine_server(moe_a2a_backend=backend, device="cuda")
        for backend in ("none", "deepep")
    )
    check_experts_of(none, name)
    if name in DP_ATTENTION:
        check_model(model, IN_REPLICAS)
        check_experts_of(deepep, name)
        return
    with pytest.raises(
        DcpConfigError, match=f"--enable-dp-attention with {name} does not .*Qwen3Moe"
    ):
        check_model(model, IN_REPLICAS)
    with pytest.raises(DcpConfigError, match=f"{A2A} deepep with {name} does not"):
        check_experts_of(deepep, name)


@pytest.mark.parametrize("name", served())
def test_dp_attention_is_what_sglangs_source_says(name: str) -> None:
    """Attention takes its heads by the width of a replica's ranks, or it does not."""
    from sglang.srt.models.registry import ModelRegistry

    model, _ = ModelRegistry.resolve_model_cls([name])
    sources = [inspect.getsource(kind) for kind in classes_of(model, set())]
    # A model may name the attention of its parent, too, as Qwen3 does.
    layers = [source for source in sources if "RadixAttention(" in source]
    by_replica = any("attn_tp_size" in source for source in layers)
    assert layers
    # PhiMoE's experts add up over all ranks. 0.5.23 refuses it.
    assert by_replica == (name in (*DP_ATTENTION, "PhiMoEForCausalLM"))


def classes_of(model: Any, known: set[type]) -> set[type]:
    """`model` and the classes of SGLang's models that its source names, and so on."""
    known.add(model)
    module = sys.modules[model.__module__]
    for word in set(re.findall(r"\b[A-Z]\w+", inspect.getsource(model))):
        found = getattr(module, word, None)
        ours = isinstance(found, type) and "sglang.srt.models" in found.__module__
        if ours and found not in known:
            classes_of(found, known)
    return known


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    check_server_args(fine_server(device="cpu"))
    with pytest.raises(DcpConfigError, match=r"--device cuda \(ROCm\)"):
        check_server_args(fine_server(device="cuda", attention_backend="triton"))


@pytest.mark.parametrize("flag", CASES)
def test_server_flag(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = server_subject(flag, monkeypatch)
    entry = first_to_speak(IN_FORCE, subject)
    assert entry.flag == flag and entry.reason and entry.hint
    with pytest.raises(DcpConfigError) as caught:
        check_server_args(subject)
    message = str(caught.value)
    assert message.startswith(f"{flag}{CASES[flag][1]} does not work with DCP: ")
    assert message.endswith(f"{entry.reason}; {entry.hint}")


def test_each_model_entry_has_a_case() -> None:
    rules = rules_in_force(UNSUPPORTED_MODELS)
    spoke = {
        first_to_speak(rules, fine_model(**changes))
        for changes, _ in MODEL_CASES.values()
    }
    assert spoke == set(rules)


@pytest.mark.parametrize("name", MODEL_CASES)
def test_model(name: str) -> None:
    changes, shown = MODEL_CASES[name]
    with pytest.raises(DcpConfigError) as caught:
        check_model(fine_model(**changes), CONFIG)
    assert str(caught.value).startswith(f"--model-path {shown} does not work with DCP")
    assert "; serve this model " in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="all-defaults"),
        pytest.param({"kv_cache_dtype": "bfloat16"}, id="bfloat16"),
        pytest.param({"kv_cache_dtype": "bf16"}, id="bf16"),
        pytest.param({"kv_cache_dtype": "fp8_e4m3"}, id="fp8"),
        pytest.param({"kv_canary": None}, id="no-canary"),
        pytest.param({"attention_backend": None}, id="no-backend-named"),
        pytest.param({"decode_attention_backend": "torch_native"}, id="decode-backend"),
    ],
)
def test_fine_servers_are_not_refused(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rule in IN_FORCE:
        monkeypatch.delenv(rule.flag, raising=False)
    check_server_args(fine_server(**changes))


@pytest.mark.parametrize("phase", ["", "prefill-", "decode-"], ids=str)
def test_attention_backend_without_backend(phase: str) -> None:
    name = f"{phase.replace('-', '_')}attention_backend"
    with pytest.raises(DcpConfigError, match=f"--{phase}attention-backend fa3") as e:
        check_server_args(fine_server(**{name: "fa3"}))
    assert "on device cpu" in str(e.value) and "use torch_native" in str(e.value)


def on_gpu(**more: Any) -> Requirement:
    return Requirement("cuda", **{"dtype": torch.bfloat16, **more})


def on_mla(**more: Any) -> Requirement:
    return on_gpu(**{"mla": True, "head_dim": (512, 64), **more})


GPU_BACKENDS = {
    "fa3": ("fa3", on_gpu(head_dim=128), None),
    "fa3-96": ("fa3", on_gpu(head_dim=96), None),
    "fa3-fp16": ("fa3", on_gpu(dtype=torch.float16), None),
    "fa3-fp8": ("fa3", on_gpu(kv_dtype=FP8), None),
    "triton": ("triton", on_gpu(head_dim=80), None),
    "flashinfer": ("flashinfer", on_gpu(head_dim=64, kv_dtype=FP8), None),
    "bf16-named": ("triton", on_gpu(kv_dtype=torch.bfloat16), None),
    "torch_native-fp32": ("torch_native", on_gpu(dtype=torch.float32), None),
    "unknown": (
        "flex_attention",
        on_gpu(),
        "--attention-backend flex_attention .*use fa3, flashinfer, triton, torch_n",
    ),
    "flashmla": (
        "flashmla",
        on_mla(),
        "--attention-backend flashmla .*shards without a key; use fa3, flashinfer, t",
    ),
    "fa3-mla": ("fa3", on_mla(), None),
    "fa3-mla-fp16": ("fa3", on_mla(dtype=torch.float16), None),
    "flashinfer-mla": ("flashinfer", on_mla(), None),
    "flashinfer-mla-fp8": ("flashinfer", on_mla(kv_dtype=FP8), None),
    "torch_native-mla": ("torch_native", on_mla(head_dim=(64, 16)), None),
    "triton-mla": (
        "triton",
        on_mla(),
        "--attention-backend triton .*latent attention; use fa3, flashinfer, torch_n",
    ),
    "flashinfer-mla-heads": ("flashinfer", on_mla(local_heads=16), None),
    "flashinfer-mla-12-heads": (
        "flashinfer",
        on_mla(local_heads=12),
        "--attention-backend flashinfer .*divide 128, not 12; use fa3, torch_native",
    ),
    "small-latent": (
        "flashinfer",
        on_mla(head_dim=(64, 16)),
        "--model-path kv_lora_rank 64, qk_rope_head_dim 16 .*use --att.* torch_native",
    ),
    "flashinfer-80": (
        "flashinfer",
        on_gpu(head_dim=80),
        "--model-path head_dim 80 .*flashinfer.*; use --attention-backend triton or torch_native",
    ),
    "fa3-320": (
        "fa3",
        on_gpu(head_dim=320),
        "--model-path head_dim 320 .*; use --attention-backend triton or torch_native",
    ),
    "torch_native-fp8": (
        "torch_native",
        on_gpu(kv_dtype=FP8),
        "--kv-cache-dtype float8_e4m3fn .*torch_native.*; use --attention-backend fa3",
    ),
    "fa3-mla-fp8": (
        "fa3",
        on_mla(kv_dtype=FP8),
        "--kv-cache-dtype float8_e4m3fn .*copy the whole pool.*backend flashinfer$",
    ),
    "mla-fp8-of-fp16": (
        "flashinfer",
        on_mla(dtype=torch.float16, kv_dtype=FP8),
        "--kv-cache-dtype float8_e4m3fn .*bfloat16 models alone; use --kv-cache-dtype a",
    ),
    "nothing-serves": (
        "fa3",
        Requirement("cpu", dtype=torch.bfloat16, head_dim=64, kv_dtype=FP8),
        "--kv-cache-dtype float8_e4m3fn .*torch_native.*; use --kv-cache-dtype auto",
    ),
    "bf16-cache-of-fp16": (
        "triton",
        on_gpu(dtype=torch.float16, kv_dtype=torch.bfloat16),
        "--kv-cache-dtype bfloat16 .*; use --kv-cache-dtype auto",
    ),
    **{
        f"{name}-fp32": (
            name,
            on_gpu(dtype=torch.float32),
            f"--dtype float32 .*{name}.*16-bit.*; use --attention-backend torch_nat",
        )
        for name in ("fa3", "flashinfer", "triton")
    },
}


@pytest.mark.parametrize("name, need, message", GPU_BACKENDS.values(), ids=GPU_BACKENDS)
def test_attention_backends_of_a_gpu(
    name: str, need: Requirement, message: str | None
) -> None:
    if message is None:
        check_backend(name, need)
        return
    with pytest.raises(DcpConfigError, match=message):
        check_backend(name, need)


def test_backends_of_two_phases() -> None:
    named = {"attention_backend": "fa3", "decode_attention_backend": "triton"}
    with pytest.raises(DcpConfigError, match="name one backend"):
        check_server_args(fine_server(device="cuda", **named))


def test_a_default_exists_for_every_device_and_kind_of_attention() -> None:
    for device in (None, "cpu", "cuda"):
        for mla in (False, True):
            assert backend_names(Requirement(device, mla))


DEFAULTS = {
    "preferred": ("fa3", on_gpu(head_dim=128), "fa3", ""),
    "another-can": ("fa3", on_gpu(head_dim=320), "triton", "not fa3.*no kernel"),
    "no-hopper": ("flashinfer", on_gpu(head_dim=80), "triton", "not flashinfer"),
    "without-backend": (
        "trtllm_mha",
        on_gpu(head_dim=64),
        "flashinfer",
        "no DCP backend",
    ),
    "mla": ("fa3", on_mla(), "fa3", ""),
    "mla-fp8": ("fa3", on_mla(kv_dtype=FP8), "flashinfer", "not fa3.*fp8 latents"),
    "mla-small": ("fa3", on_mla(head_dim=(64, 16)), "torch_native", "not fa3.*no kern"),
    "cpu": (None, Requirement("cpu"), "torch_native", ""),
    # Chosen for want of another, and then refused with the reason.
    "none-can": ("fa3", on_gpu(dtype=torch.float32, kv_dtype=FP8), "fa3", ""),
}


@pytest.mark.parametrize(
    "preferred, need, chosen, why", DEFAULTS.values(), ids=DEFAULTS
)
def test_default_backend_says_why(
    preferred: str | None,
    need: Requirement,
    chosen: str,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "sglang_dcp")
    assert default_backend(preferred, need) == chosen
    [line] = caplog.messages
    assert f"using {chosen}" in line and re.search(why, line)
    assert ("not" in line.split(chosen)[1]) == bool(why)


def test_every_backend_is_a_hook_and_has_a_file_of_its_name() -> None:
    from sglang_dcp.hooks.table import HOOKS

    hooks = {hook.target for hook in HOOKS}
    for mla in (False, True):
        for name, found in backends(mla).items():
            [_] = [t for t in hooks if t.endswith(f"ATTENTION_BACKENDS[{name}]")]
            module = found.__module__.rpartition(".")[2]
            assert module in (name, f"{name}_mla" if mla else name)


def test_every_mla_backend_has_a_hook_that_chooses_the_forward_method() -> None:
    from sglang_dcp.hooks.table import HOOKS

    hooks = {hook.target.rpartition(".")[2] for hook in HOOKS}
    assert {f"_handlers[{name}]" for name in backends(mla=True)} <= hooks


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param({"architecture": name}, id=name) for name in served()),
        # Qwen2 carries a window that it does not use.
        pytest.param(
            {"text": {"sliding_window": 4096, "use_sliding_window": False}},
            id="unused-window",
        ),
        pytest.param({"text": {"sliding_window": 8192}}, id="window-of-the-context"),
        pytest.param(
            {"text": {"layer_types": ["full_attention"] * 2}}, id="full-layers"
        ),
        pytest.param({"kv_heads": 1}, id="kv-head-replicated"),
        *(
            pytest.param({"quantization": name}, id=name)
            for name in sorted(LOADS_RIGHT)
        ),
    ],
)
def test_fine_models_are_not_refused(changes: dict[str, Any]) -> None:
    check_model(fine_model(**changes), CONFIG)


@pytest.mark.parametrize(
    ("layout", "heads", "kv_heads", "message"),
    [
        pytest.param(
            Layout(4, 2),
            6,
            2,
            r"--tp-size 4 does not divide the model's 6 query heads. Use --tp-size 2 "
            r"\(--dcp-size 2\) or --tp-size 3",
            id="q-heads",
        ),
        pytest.param(
            Layout(3, 1),
            8,
            2,
            r"--tp-size 3 does not .* --tp-size 8 \(--dcp-size 2, 4, 8\)",
            id="q-heads-beyond-tp",
        ),
        pytest.param(
            Layout(4, 2),
            12,
            3,
            r"--attn-tp-size 2 .*Use --tp-size 4 \(--dcp-size 4\)",
            id="kv-heads",
        ),
        pytest.param(Layout(4, 2), 8, 3, "8 query heads and 3 KV", id="ratio"),
    ],
)
def test_heads_that_do_not_divide(
    layout: Layout, heads: int, kv_heads: int, message: str
) -> None:
    model = fine_model(text={"num_attention_heads": heads}, kv_heads=kv_heads)
    with pytest.raises(DcpConfigError, match=message):
        check_model(model, DcpConfig(layout))


def test_mla_has_one_head_whatever_its_config_says() -> None:
    model = fine_model(attention_arch=AttentionArch.MLA, kv_heads=3)
    check_model(model, CONFIG)


# What SGLang calls the weights, what the checkpoint says of them, and our name of both.
def compressed(form: str, bits: int, strategy: str) -> tuple[str, dict[str, Any], str]:
    """A checkpoint of compressed-tensors, and the name of its format."""
    groups = {"group_0": {"weights": {"num_bits": bits, "strategy": strategy}}}
    name = "compressed-tensors"
    shown = f"{name}-{form}-{bits}bit-{strategy}"
    return name, {"format": form, "config_groups": groups}, shown


QUANTIZED: tuple[tuple[str, dict[str, Any] | None, str], ...] = (
    ("fp8", {"weight_block_size": [128, 128]}, "fp8-block"),
    ("fp8", {"activation_scheme": "static"}, "fp8-tensor-static"),
    ("fp8", {"activation_scheme": "dynamic"}, "fp8-tensor-dynamic"),
    ("fp8", None, "fp8-online"),
    compressed("float-quantized", 8, "channel"),
    compressed("float-quantized", 8, "block"),
    compressed("float-quantized", 8, "tensor"),
    compressed("int-quantized", 8, "channel"),
    compressed("int-quantized", 8, "tensor"),
    compressed("pack-quantized", 4, "group"),
    compressed("pack-quantized", 8, "channel"),
    ("awq_marlin", {"bits": 4}, "awq_marlin-4bit"),
    ("gptq_marlin", {"bits": 4}, "gptq_marlin-4bit"),
    ("gptq_marlin", {"bits": 8}, "gptq_marlin-8bit"),
    *((name, {}, name) for name in sorted(LOADS_RIGHT - {"fp8", "compressed-tensors"})),
)

# What `test/srt/gpu/test_server_gpu_quant.py` showed on GPUs.
RAN_WITH_LATENTS = {
    "compressed-tensors-float-quantized-8bit-channel",
    "compressed-tensors-pack-quantized-4bit-group",
    "fp8-block",
    "fp8-online",
    "fp8-tensor-dynamic",
    "gptq_marlin-4bit",
    "modelopt_fp8",
}
RAN = RAN_WITH_LATENTS | {
    "awq_marlin-4bit",
    "compressed-tensors-int-quantized-8bit-channel",
}


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize(("name", "config", "shown"), QUANTIZED)
def test_replicated_q_of_quantized_weights(
    name: str, config: Any, shown: str, mla: bool
) -> None:
    """A GPU serves those whose servers were compared there, for each kind of attention."""
    model = fine_model(
        architecture="DeepseekV3ForCausalLM" if mla else "Qwen3ForCausalLM",
        attention_arch=AttentionArch.MLA if mla else AttentionArch.MHA,
        quantization=name,
        quantization_config=config,
    )
    if not packed_latents(model):
        check_model(model, REPLICATED)
    check_replicated_q(model, "cpu")
    ran = RAN_WITH_LATENTS if mla else RAN
    if shown in ran and in_range(sglang_version(), "0.5.23", None):
        check_replicated_q(model, "cuda")
        return
    what = f"MLA and {shown}" if mla else shown
    message = f"^--dcp-replicate-q-proj with {what} weights does .*; drop --dcp-repl"
    with pytest.raises(DcpConfigError, match=message):
        check_replicated_q(model, "cuda")


def test_replicated_q_of_weights_that_are_not_quantized() -> None:
    for device in ("cuda", "cpu", None):
        check_replicated_q(fine_model(), device)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_device_that_is_not_chosen_yet(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: on_gpu)
    model = fine_model(quantization="humming")
    with pytest.raises(DcpConfigError) if on_gpu else nullcontext():
        check_replicated_q(model, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "Qwen3ForCausalLM"},
        {"quantization_config": {"weight_block_size": None}},
        {"quantization_config": {}},
        {"quantization": "compressed-tensors"},
    ],
    ids=str,
)
def test_fp8_whose_scales_are_loaded(changes: dict[str, Any]) -> None:
    blocks = {"weight_block_size": [128, 128]}
    fp8 = {"quantization": "fp8", "quantization_config": blocks}
    check_model(fine_model(**{**fp8, **changes}), CONFIG)


def test_architectures_that_load_as_llama() -> None:
    for name in ("llama", "ministral3", "mistral", "phi3_small", "teleflm"):
        importlib.import_module(f"sglang.srt.models.{name}")
    from sglang.srt.models.llama import LlamaForCausalLM

    def of(kind: type) -> Iterator[type]:
        yield kind
        for below in kind.__subclasses__():
            yield from of(below)

    loaded = {kind.__name__ for kind in of(LlamaForCausalLM)}
    assert loaded & {*served()} == {*LOADED_AS_LLAMA} & {*served()}


def test_each_format_of_this_sglang_is_judged() -> None:
    """A new release may bring a loader that cuts K/V heads in a way of its own."""
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    assert {*QUANTIZATION_METHODS} <= LOADS_RIGHT | OTHER_DEVICES | CUTS_BY_RANK
    assert not LOADS_RIGHT & (OTHER_DEVICES | CUTS_BY_RANK)


@pytest.mark.parametrize("name", NORMS_OVER_HEADS)
def test_replicated_q_of_a_model_that_norms_over_heads(name: str) -> None:
    config = DcpConfig(Layout(4, 2), replicate_q_proj=True)
    check_model(fine_model(architecture=name), CONFIG)
    check_model(fine_model(architecture=name, text={"use_qk_norm": False}), config)
    with pytest.raises(DcpConfigError, match=f"--dcp-replicate-q-proj with {name}"):
        check_model(fine_model(architecture=name), config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({name: value, **more}, message, id=f"{name}-{value}")
        for name, value, message, more in (
            ("speculative_algorithm", "NGRAM", "--speculative-algorithm NGRAM", {}),
            ("disaggregation_mode", "prefill", "--disaggregation-mode prefill", {}),
            ("enable_hierarchical_cache", True, "--enable-hierarchical-cache ", {}),
            ("enable_dp_attention", True, "--enable-dp-attention ", {"dp_size": 2}),
            ("kv_cache_dtype", "fp8_e5m2", "--kv-cache-dtype fp8_e5m2", {}),
            ("attention_backend", "fa3", "--attention-backend fa3 .*use torch", {}),
            ("prefill_attention_backend", "triton", "--prefill-att.* triton", {}),
            ("enable_lora", True, "--enable-lora with --dcp-rep", REPLICATE),
            ("lora_paths", ["a=/b"], "--lora-paths with --dcp-rep", REPLICATE),
            ("lora_paths", {"a": "/b"}, "--lora-backend csgmv on a CPU", {}),
            ("attn_dp_size", 2, "--enable-dp-attention with Llama", {}),
            ("moe_a2a_backend", "deepep", "--moe-a2a-backend deepep on a CPU", {}),
            ("dwdp_size", 4, "--dwdp-size 4", {}),
            ("weight_cache_mode", "daemon", "--weight-cache-mode daemon", {}),
            ("enable_kv_cache_sharding", True, "--enable-kv-cache-sharding ", {}),
        )
        if name in FIELDS
    ],
)
def test_through_the_real_constructor(
    arguments: dict[str, Any], message: str, server_args: Any
) -> None:
    with pytest.raises(DcpConfigError, match=message):
        server_args(tp_size=4, dcp_size=2, **arguments)


def test_sglang_defaults_are_the_fine_values(server_args: Any) -> None:
    """What this file calls fine is what SGLang has when no flag is given."""
    args = server_args(tp_size=4, dcp_size=2)
    resolved = sglang_api().resolved(args)
    fine = vars(fine_server(dcp=args.dcp, page_size=2))
    # Resolved, it is an object that names a backend for each phase.
    assert fine.pop("cuda_graph_config") is None
    assert resolved.cuda_graph_config.decode.backend in ("full", "disabled")
    assert {name: getattr(resolved, name) for name in fine} == fine


@since("enable_return_aux_hidden_states")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"architectures": ["DbrxForCausalLM"]},
            "^--speculative-draft-model-path .*: --model-path DbrxForCausalLM does not",
            id="architecture",
        ),
        pytest.param(
            {"num_attention_heads": 2},
            "^--speculative-draft-model-path .* --tp-size 4 does not divide .* 2 query",
            id="heads",
        ),
        pytest.param({"architectures": ["LlamaForCausalLMEagle3"]}, "", id="eagle3"),
        pytest.param({}, "", id="the-target"),
    ],
)
def test_draft_model(
    changes: dict[str, Any],
    message: str,
    server_args: Any,
    tiny_llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A draft is checked at start too, and may be of an architecture of its own."""
    monkeypatch.setattr(speculation, "SERVED_ON_CPU", ALGORITHMS)
    config = json.loads((Path(tiny_llama) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    arguments = dict(
        tp_size=4,
        dcp_size=2,
        speculative_algorithm="EAGLE",
        speculative_eagle_topk=1,
        speculative_num_steps=3,
        speculative_num_draft_tokens=4,
        speculative_draft_model_path=str(tmp_path),
    )
    if not message:
        assert server_args(**arguments).dcp.dcp_size == 2
        return
    with pytest.raises(DcpConfigError, match=message):
        server_args(**arguments)


def test_real_model_config_with_a_window(
    server_args: Any, tiny_llama: str, tmp_path: Path
) -> None:
    """SGLang reads the model while it resolves its arguments: refused before weights."""
    config = json.loads((Path(tiny_llama) / "config.json").read_text())
    config.update(architectures=["MistralForCausalLM"], model_type="mistral")
    config.update(sliding_window=64)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        DcpConfigError, match=r"--model-path MistralForCausalLM \(sliding_window 64\)"
    ):
        server_args(tp_size=4, dcp_size=2, model_path=str(tmp_path))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
