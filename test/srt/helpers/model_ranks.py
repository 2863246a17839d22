"""Whole models in ranks that are forked from one process which imported SGLang.

A rank builds SGLang's own `ModelRunner` and runs one prefill of a ragged batch and some
decode steps. There is no scheduler and no HTTP server, so a model takes a few seconds.
The tokens are given, not sampled, so every step can be compared.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Mapping

import torch

from helpers.gloo_ranks import run_python
from helpers.server_args import resolve_server_args
from sglang_dcp.layers.heads import is_mla

PROMPTS = (3, 21, 38)
STEPS = 5
_TIMEOUT_S = 240
FOUND = "found.json"


def found_by_worker(
    file: str, folder: Path, *arguments: str, **environment: str
) -> dict[str, Any]:
    """Run `file` as a worker on CPUs, which writes what it finds to `FOUND` in `folder`."""
    done = run_python(
        file,
        "--worker",
        str(folder),
        *arguments,
        timeout_s=1800,
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
        **environment,
    )
    result = folder / FOUND
    assert done.code == 0 and result.exists(), done.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found


@dataclass(frozen=True)
class Run:
    """One way to run a model: its name and the server arguments of all its ranks.

    With `updated` the ranks start on the weights of `other_weights(model)`, and then take
    those of the model, from disk.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]
    updated: bool = False

    @property
    def ranks(self) -> int:
        return int(dict(self.arguments)["tp_size"])


def other_weights(model: Path) -> Path:
    """Where a checkpoint of the same model with other weights lies."""
    return model.with_name(f"{model.name}-other")


def forced_ids(seed: int = 0) -> list[list[int]]:
    """Prompts and the tokens of all decode steps, one list for each request."""
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (length + STEPS,), generator=draw).tolist()
        for length in PROMPTS
    ]


def hf_logprobs(model: Path) -> torch.Tensor:
    """Log-probabilities of Hugging Face transformers, float32 and without a cache.

    Returns [1 + STEPS, requests, vocabulary] float32: after the prompt, then each step.
    """
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = []
    with torch.inference_mode():
        for ids, length in zip(forced_ids(), PROMPTS):
            logits = loaded(torch.tensor([ids])).logits[0, length - 1 :]
            rows.append(logits.float().log_softmax(-1))
    return torch.stack(rows, dim=1)


def run_model(model: Path, run: Run, folder: Path) -> list[str]:
    """Fork the ranks of `run` and wait. Each leaves `RUN-RANK.pt` in `folder`.

    Returns the fault of each rank, or "".
    """
    port = free_port()
    return run_forked(
        [
            lambda rank=rank: torch.save(  # type: ignore[misc]
                _rank_logprobs(model, run, rank, port), folder / f"{run.name}-{rank}.pt"
            )
            for rank in range(run.ranks)
        ],
        folder,
        run.name,
    )


def run_forked(
    works: Iterable[Callable[[], None]], folder: Path, name: str
) -> list[str]:
    """Run each of `works` in a fork of this process, at once. Return their faults."""
    return wait_forked(start_forked(works, folder, name))


Forked = tuple[ForkProcess, Path]


def start_forked(
    works: Iterable[Callable[[], None]], folder: Path, name: str
) -> list[Forked]:
    fork = multiprocessing.get_context("fork")
    started = []
    for index, work in enumerate(works):
        log = folder / f"{name}-{index}.log"
        process = fork.Process(target=_run, args=(work, log))
        process.start()
        started.append((process, log))
    return started


def wait_forked(started: Iterable[Forked]) -> list[str]:
    faults = []
    for process, log in started:
        process.join(_TIMEOUT_S)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        text = log.read_text(errors="replace")[-3000:]
        ended = f"no end after {_TIMEOUT_S} s" if late else f"exit {process.exitcode}"
        faults.append("" if process.exitcode == 0 else f"{ended}\n{text}")
    return faults


def _run(work: Callable[[], None], log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(out, stream)
    torch.set_num_threads(1)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing that the process imported may keep it alive.
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def load_runner(
    model: Path, arguments: tuple[tuple[str, Any], ...], rank: int, port: int
) -> Any:
    """Make SGLang's `ModelRunner` of one rank on a CPU, with its weights and pools.

    Returns the runner of SGLang's own benchmark, which wraps it.
    """
    from sglang.benchmark import one_batch
    from sglang.srt import server_args as module

    given = {
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "max_total_tokens": 200,
        "random_seed": 0,
        **dict(arguments),
    }
    args = resolve_server_args(module.ServerArgs(model_path=str(model), **given))
    _enter(args, rank)
    _replace_kernels()
    ports = SimpleNamespace(nccl_port=port)
    return one_batch.load_model(args, ports, rank, rank)[0]


def _rank_logprobs(model: Path, run: Run, rank: int, port: int) -> torch.Tensor:
    from sglang.benchmark import one_batch

    start = other_weights(model) if run.updated else model
    runner = load_runner(start, run.arguments, rank, port)
    if run.updated:
        updater = runner.torch_runner.weight_updater
        done, message = updater.update_weights_from_disk(str(model), "auto")
        assert done, message
    _check_export(runner.torch_runner, dict(run.arguments))
    return _forced_logprobs(one_batch, runner)


def _check_export(runner: Any, arguments: Mapping[str, Any]) -> None:
    """SGLang may send weights to another server, but not those that DCP cut."""
    replicated_q = arguments.get("dcp_replicate_q_proj")
    cut = "attn_tp_size" in arguments or "dcp_size" in arguments
    cut = cut and bool(replicated_q or not is_mla(runner.model_config))
    assert hasattr(runner.model, "_weight_export_error") == cut


def _enter(args: Any, rank: int) -> None:
    """Do what `configure_scheduler_process` does, less its proof of all hooks."""
    from sglang_dcp.context import DcpContext, set_context
    from sglang_dcp.releases.api import sglang_api
    from sglang_dcp.releases.installed import in_range, sglang_version

    if args.dcp is not None:
        sglang_api().hide_dcp_size(args)
        # With DP attention, a rank counts inside its replica.
        set_context(DcpContext(args.dcp, rank % args.dcp.tp_size))
    if in_range(sglang_version(), None, "0.5.21"):
        return
    from sglang.benchmark import one_batch
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank

    world_rank = spawn_world_rank(args, tp_rank=rank, pp_rank=0)
    ranks = SpawnRanks(world_rank=world_rank, gpu_id=rank)
    publish(args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()


def _replace_kernels() -> None:
    """Put formulas in the place of Triton kernels that models call without a GPU too."""
    from sglang.srt.models import deepseek, minimax_m2, qwen2_moe, xverse_moe

    def gate(
        hidden: torch.Tensor, weight: torch.Tensor, shared: torch.Tensor, out: Any
    ) -> None:
        out += (hidden @ weight).sigmoid()[:, None] * shared

    def sums(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows.float().pow(2).sum(-1) for rows in (q, k)])

    def apply(
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        sum_sq: torch.Tensor,
        ranks: int,
        eps: float,
    ) -> list[torch.Tensor]:
        parts = zip((q, k), (q_weight, k_weight), sum_sq.chunk(2))
        return [
            rows * (total / rows.shape[1] / ranks + eps).rsqrt()[:, None] * weight
            for rows, weight, total in parts
        ]

    def experts(
        hidden: torch.Tensor, w1: Any, w2: Any, topk_output: Any, *_: Any, **__: Any
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for index, (first, second) in enumerate(zip(w1, w2)):
            chosen = topk_output.topk_ids == index
            share = (topk_output.topk_weights * chosen).sum(-1, keepdim=True)
            gate, up = (hidden @ first.T).chunk(2, -1)
            out += share * ((torch.nn.functional.silu(gate) * up) @ second.T)
        return out

    deepseek.fused_moe = xverse_moe.fused_moe = experts
    minimax_m2.rms_sumsq_serial = sums
    minimax_m2.rms_apply_serial = apply
    qwen2_moe.fused_gate_sigmoid_mul_add = gate


def _forced_logprobs(one_batch: Any, runner: Any) -> torch.Tensor:
    ids = forced_ids()
    prompts = [row[:length] for row, length in zip(ids, PROMPTS)]
    requests = one_batch.prepare_synthetic_inputs_for_latency_test(0, 0, prompts)
    for request in requests:
        # DP attention reads it as a string.
        request.rid = str(request.rid)
    _, logits, batch = runner.extend(requests)
    rows = [logits.clone()]
    for step in range(STEPS):
        forced = torch.tensor([row[n + step] for row, n in zip(ids, PROMPTS)])
        _, logits = runner.decode(forced, batch)
        rows.append(logits.clone())
    return torch.stack(rows).float().log_softmax(-1)
