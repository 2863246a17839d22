"""The teacher-forcing plugin itself: a live CPU server against Hugging Face transformers.

The GPU tests compare servers that all carry the plugin. Only here is it seen that what
they report are the model's log-probabilities of the forced tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import teacher_forcing
from helpers.servers import plugin_folder, server
from sglang_dcp.demo.client import Reply, http_json
from sglang_dcp.demo.tiny_model import make_tiny_model

FLAGS = (
    "--tp 1 --attention-backend torch_native --max-total-tokens 4096 "
    "--chunked-prefill-size 256 --max-running-requests 16 --enable-fp32-lm-head"
)
TOLERANCE = 1e-3


def short_waves() -> list[teacher_forcing.Wave]:
    """The usual requests, but for what takes a CPU too long."""
    waves = teacher_forcing.build_waves()[:-1]
    together = [
        p
        for p in teacher_forcing.build_waves()[-1]
        if len(p.ids) < 200 and not p.shared
    ]
    return [*waves, together[:12]]


def recompute(
    model_dir: Path, waves: Sequence[teacher_forcing.Wave]
) -> dict[str, Reply]:
    """What transformers gives the forced tokens: one whole forward a prompt."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    replies = {}
    for prompt in (prompt for wave in waves for prompt in wave):
        start = len(prompt.ids)
        ids = [
            teacher_forcing.forced_token(start + n) for n in range(prompt.new_tokens)
        ]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt.ids, *ids]])).logits[0]
        rows = logits[start - 1 : -1].float().log_softmax(-1)
        scores = rows.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        replies[prompt.name] = Reply(ids, scores.tolist())
    return replies


def test_forced_token_takes_ints_and_tensors() -> None:
    positions = range(1000)
    ids = [teacher_forcing.forced_token(position) for position in positions]
    assert teacher_forcing.forced_token(torch.tensor(positions)).tolist() == ids
    assert min(ids) >= 0x20 and max(ids) < 0x7F and len(set(ids[:70])) == 70


def test_requests_cover_the_cases() -> None:
    *alone, together = teacher_forcing.build_waves()
    prompts = [prompt for wave in (*alone, together) for prompt in wave]
    assert all(len(wave) == 1 for wave in alone) and len(together) == 64
    assert len({prompt.name for prompt in prompts}) == len(prompts)
    lengths = {len(prompt.ids) for prompt in prompts}
    assert min(lengths) == 1 and max(lengths) == 32768
    longest = max(len(prompt.ids) + prompt.new_tokens for prompt in prompts)
    assert longest < teacher_forcing.CONTEXT_LENGTH
    assert sum(bool(prompt.shared) for prompt in together) == 3


def test_prompts_of_one_prefix_have_one_adapter() -> None:
    waves = teacher_forcing.build_waves()
    first, *others = teacher_forcing.with_adapters(waves, ("a", "b"))
    assert [prompt.adapter for prompt in first] == [None, "a", "b"]
    assert len({prompt.ids for prompt in first}) == 1
    assert [[replace(p, adapter=None) for p in wave] for wave in others] == [
        list(wave) for wave in waves
    ]
    prompts = [prompt for wave in others for prompt in wave]
    base = next(prompt.ids for prompt in prompts if prompt.name == "base-1500")
    family = [p for p in prompts if len(p.ids) > 2 and p.ids[:3] == base[:3]]
    assert len(family) == 7 and {prompt.adapter for prompt in family} == {"a"}
    assert {prompt.adapter for prompt in others[-1]} == {None, "a", "b"}


def test_distance_names_the_worst_request_and_keeps_nan() -> None:
    want = {"a": Reply([1, 2], [0.0, 0.0]), "b": Reply([1], [0.0])}
    got = {"a": Reply([1, 2], [0.5, 0.0]), "b": Reply([1], [-0.4])}
    found = teacher_forcing.distance(got, want)
    assert (found.request, found.worst, found.tokens) == ("b", 0.5, 3)
    assert found.mean == pytest.approx(0.3) and found.worst_request == 0.4
    got["b"] = Reply([1], [float("nan")])
    assert not teacher_forcing.distance(got, want).mean < 1e9


@pytest.mark.server
def test_log_probabilities_are_the_models(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "llama-2kv", "llama-2kv")
    waves = short_waves()
    env = plugin_folder(tmp_path, "forced_tokens", teacher_forcing.PLUGIN)
    flags = f"{FLAGS} {teacher_forcing.CONTEXT_FLAGS}"
    with server(model, flags, env) as running:
        replies = teacher_forcing.ask(running.base_url, waves)
        info = http_json(f"{running.base_url}/server_info")
    teacher_forcing.check_replies(waves, replies, info["page_size"])
    found = teacher_forcing.distance(replies, recompute(model, waves))
    print(f"{found} over {found.tokens} tokens")
    assert found.mean < TOLERANCE and found.worst < TOLERANCE


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
