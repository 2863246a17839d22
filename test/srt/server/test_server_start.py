"""Live processes that must not serve: drifted SGLang, refused flags, a dead rank.

Only here is it seen that a server which is refused ends with one line and its exit status
before any weight is loaded, and that no process is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import psutil
import pytest

from helpers.gloo_ranks import python_path
from helpers.servers import READY_SECONDS, plugin_folder, server
from sglang_dcp.demo.server import ServerProcess, run_to_exit
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = pytest.mark.server

DCP = ["--dtype", "float32", "--tp", "2", "--dcp-size", "2"]
FP8_CACHE = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "kv_cache_quant_algo": "FP8",
}
TOUCHED = "srt/layers/linear.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "llama-2kv", "llama-2kv")


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which one file of SGLang has one more line."""
    from sglang_dcp.hooks.verify import package_root

    root = tmp_path_factory.mktemp("drift")
    # A farm of links: Python imports the copy, the installed files stay untouched.
    subprocess.run(["cp", "-rs", package_root(), root / "sglang"], check=True)
    target = root / "sglang" / TOUCHED
    text = target.read_text()
    target.unlink()
    target.write_text(text + "\n")
    return {"PYTHONPATH": python_path(root)}


def test_drifted_sglang_refuses_dcp_and_serves_without(
    model: Path, drifted: dict[str, str]
) -> None:
    plain = "--attention-backend torch_native --max-total-tokens 512"
    with ServerProcess(model, DCP, env=drifted) as refused:
        with server(model, plain, drifted) as served:
            assert served.returncode is None
        code = refused.wait_exit(120)
        line = error_line(refused.log_tail())
    assert code == 2 and TOUCHED in line


def quantized(**config: Any) -> list[str]:
    """Flags that let the checkpoint say this of its weights."""
    told = json.dumps({"quantization_config": config})
    return ["--json-model-override-args", told]


REFUSED = {
    "sizes-disagree": (
        ["--tp", "4", "--dcp-size", "4", "--attn-tp-size", "2"],
        ("--attn-tp-size 2", "--dcp-size 4", "--tp-size 4"),
    ),
    "backend-without-backend": (
        [*DCP, "--attention-backend", "fa3"],
        ("--attention-backend fa3", "torch_native"),
    ),
    "heads-do-not-divide": (
        ["--tp", "16", "--dcp-size", "2"],
        ("8", "16"),
    ),
    "weights-cut-by-rank": (
        [*DCP, *quantized(quant_method="bitsandbytes", load_in_4bit=True)],
        ("--model-path LlamaForCausalLM (bitsandbytes)", "another quantization"),
    ),
    "fp8-cache-by-checkpoint": (
        [*DCP, *quantized(**FP8_CACHE)],
        ("--kv-cache-dtype auto, which means float8_e4m3fn", "--kv-cache-dtype bf16"),
    ),
    "adapters-beside-replicated-q": (
        [*DCP, "--dcp-replicate-q-proj", "--lora-paths", "a=/nowhere"],
        ("--lora-paths with --dcp-replicate-q-proj", "drop --dcp-replicate-q-proj"),
    ),
}


@pytest.fixture(scope="module")
def refusals(model: Path) -> Iterator[dict[str, Future[tuple[int, str]]]]:
    """Exit status and output of each; two run at once, as each is one core's work."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {
            name: pool.submit(run_to_exit, model, args)
            for name, (args, _) in REFUSED.items()
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(
    name: str, refusals: dict[str, Future[tuple[int, str]]]
) -> None:
    code, output = refusals[name].result()
    _, parts = REFUSED[name]
    assert code == 2
    assert "Traceback" not in output and "Load weight begin" not in output
    error = error_line(output)
    assert all(part in error for part in parts), error


def error_line(output: str) -> str:
    """The one line of ours. SGLang may log the end of its processes after it."""
    found = [line for line in output.splitlines() if line.startswith("sglang-dcp:")]
    assert len(found) == 1 and found[0].startswith("sglang-dcp: error: "), output[
        -2000:
    ]
    return found[0]


def test_dead_rank_ends_the_server(model: Path) -> None:
    with server(model, "--tp 2 --dcp-size 2 --max-total-tokens 512") as dcp:
        ranks = [p for p in _descendants(dcp) if "scheduler_TP1" in _title(p)]
        assert len(ranks) == 1
        os.kill(ranks[0].pid, signal.SIGKILL)
        dcp.wait_exit(90)


# Forgets to give back the first page that is freed while the server runs.
LEAK = """
def leaky(free):
    def forgetful(self, index, **start):
        lost = self.page_size if index.numel() > self.page_size else 0
        free(self, index[lost:], **{name: at + lost for name, at in start.items()})
    return forgetful

def load():
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator as A
    for name in ("free", "free_segment"):
        if hasattr(A, name):
            setattr(A, name, leaky(getattr(A, name)))
"""


def test_a_leaked_page_ends_the_server(model: Path, tmp_path: Path) -> None:
    """SGLang's own check at idle, in logical tokens; the warm-up request is enough."""
    args = [*DCP, "--max-total-tokens", "512", "--disable-radix-cache"]
    with ServerProcess(model, args, env=plugin_folder(tmp_path, "leaky", LEAK)) as dcp:
        dcp.wait_exit(READY_SECONDS)
        log = dcp.log_path.read_text(errors="replace")
    assert "pool memory leak detected! [full] total=1024, available=10" in log


ENGINE = """
import sys
import sglang as sgl

if __name__ == "__main__":
    engine = sgl.Engine(
        model_path=sys.argv[1], device="cpu", dtype="float32", tp_size=2,
        attn_tp_size=1, dcp_comm_backend="a2a", max_total_tokens=512,
    )
    info = engine.get_server_info()
    print("DCP", info["dcp_comm_backend"], info["max_total_num_tokens"])
    prompt = list(range(32, 72))
    out = engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 4})
    print("NEW", out["meta_info"]["completion_tokens"])
    engine.shutdown()
"""


def test_engine_takes_the_flags_as_keywords(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    ran = subprocess.run(
        [sys.executable, script, model],
        env={**env, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "DCP a2a 1024" in ran.stdout and "NEW 4" in ran.stdout, ran.stderr[-3000:]


def _descendants(running: ServerProcess) -> list[psutil.Process]:
    assert running._process is not None
    return psutil.Process(running._process.pid).children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
