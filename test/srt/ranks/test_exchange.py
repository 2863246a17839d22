"""Exchanges between real ranks over gloo, against attention over all keys.

Only this file can catch a wrong head order, a wrong rank order or a collective that some
rank skips: every rank holds other keys, and every rank compares its local heads. The file is
its own worker (``--worker``); one start of N ranks runs all cases of that N.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sglang_dcp.distributed.exchange import EXCHANGES, create_exchange
from sglang_dcp.distributed.exchange import dcp_a2a_lse_reduce as a2a_reduce

WORLDS = (2, 3, 4)
# `symm_a2a` stores to the memory of other GPUs.
ON_CPU = [name for name in EXCHANGES if name != "symm_a2a"]
OWN_HEADS, HEAD_DIM = 3, 20
LN2 = 0.6931471805599453
NAN, INF = float("nan"), float("inf")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# A partial output is rounded once before and once after the exchange.
TOLERANCE = {"fp16": 3e-3, "bf16": 2e-2, "fp32": 1e-5}
WORKER_TIMEOUT_S = 90


class Case(NamedTuple):
    backend: str
    tokens: int
    dtype: str
    base: str
    layout: str


CASES = {
    "{}-T{}-{}-{}-{}".format(*case): Case(*case)
    for case in itertools.product(
        ON_CPU, (0, 1, 5), DTYPES, ("e", "2"), ("dense", "strided")
    )
}


class TorchGroup:
    """The part of ``GroupCoordinator`` that exchanges use, over torch.distributed."""

    pynccl_comm = None

    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank_in_group = world_size, rank
        self.device_group = self.cpu_group = dist.group.WORLD

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        unset = NAN if input_.is_floating_point() else 255
        parts = [torch.full_like(input_, unset) for _ in range(self.world_size)]
        dist.all_gather(parts, input_)
        return torch.cat(parts, dim)


def partials(group: Any, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's (out, lse) of all heads; wanted (out, lse) of its local heads."""
    world_size, rank = group.world_size, group.rank_in_group
    gen = torch.Generator().manual_seed(7)
    heads, keys = OWN_HEADS * world_size, 23
    q, k, v = (
        torch.randn(n, heads, HEAD_DIM, generator=gen, dtype=torch.float64)
        for n in (case.tokens, keys, keys)
    )
    scores = 2 * torch.einsum("thd,shd->ths", q, k) / HEAD_DIM**0.5
    # Lengths 0 and 1 leave no rank, and only rank 0, with a key.
    lengths = torch.tensor([1, 23, 0, 7, 22])[: case.tokens].view(-1, 1, 1)
    position = torch.arange(keys)
    scores = scores.masked_fill(position >= lengths, -INF)
    local = scores.masked_fill(position % world_size != rank, -INF)
    unit = 1.0 if case.base == "e" else LN2
    out = torch.einsum("ths,shd->thd", local.softmax(-1), v).to(DTYPES[case.dtype])
    lse = (local.logsumexp(-1) / unit).float()
    if case.layout == "strided":
        out = out.transpose(0, 1).contiguous().transpose(0, 1)
        lse = lse.mT.contiguous().mT
    own = slice(rank * OWN_HEADS, (rank + 1) * OWN_HEADS)
    wanted = torch.einsum("ths,shd->thd", scores.softmax(-1).nan_to_num(0.0), v)
    wanted_lse = scores.logsumexp(-1) / unit
    return out, lse, wanted[:, own].float(), wanted_lse[:, own].float()


def check_case(group: Any, case: Case) -> None:
    out, lse, wanted, wanted_lse = partials(group, case)
    exchange = create_exchange(case.backend, group)
    # All communication before the first assertion: a failing rank must not leave.
    got, got_lse = exchange.reduce(out, lse, is_lse_base_on_e=case.base == "e")
    assert got.dtype == out.dtype and got_lse.dtype == torch.float32
    assert got.is_contiguous() and got_lse.is_contiguous()
    tol = TOLERANCE[case.dtype]
    torch.testing.assert_close(got.float(), wanted, rtol=tol, atol=tol)
    torch.testing.assert_close(got_lse, wanted_lse, rtol=1e-5, atol=1e-5)


def check_agree(group: Any) -> None:
    case = Case("", 5, "fp32", "e", "dense")
    out, lse, _, _ = partials(group, case)
    results = [
        create_exchange(name, group).reduce(out, lse, is_lse_base_on_e=True)[0]
        for name in ON_CPU
    ]
    # The same sums in the same order.
    assert all(torch.equal(other, results[0]) for other in results[1:])


def check_function(group: Any) -> None:
    out, lse, _, _ = partials(group, Case("", 5, "bf16", "2", "dense"))
    exchange = create_exchange("a2a", group)
    wanted = exchange.reduce(out, lse, is_lse_base_on_e=False)
    got = a2a_reduce(out, lse, group, is_lse_base_on_e=False, return_lse=True)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    # The natural log is the default, and other data than base 2.
    by_default = a2a_reduce(out, lse, group)
    assert isinstance(by_default, Tensor)
    assert not torch.equal(by_default, wanted[0])


def check_gather_heads(group: Any) -> None:
    rank, heads = group.rank_in_group, OWN_HEADS * group.world_size
    for tokens in (0, 1, 5):
        every = torch.randn(
            tokens, heads, 8, generator=torch.Generator().manual_seed(3)
        )
        own = every[:, rank * OWN_HEADS : (rank + 1) * OWN_HEADS]
        for name in ON_CPU:
            assert torch.equal(create_exchange(name, group).gather_heads(own), every)


def check_gather_rows(group: Any) -> None:
    rank, draw = group.rank_in_group, torch.Generator().manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        for rows in (0, 1, 5):
            every = torch.randn(rows * group.world_size, 8, generator=draw)
            every = (100 * every.abs()).to(dtype)
            # A part of wider rows, as latents may be.
            own = torch.stack([every, every])[:, rank * rows : (rank + 1) * rows][1]
            got = create_exchange("ag_rs", group).gather_rows(own)
            assert got.dtype == dtype and torch.equal(got.float(), every.float())


def check_refuse(group: Any) -> None:
    exchange = create_exchange("a2a", group)
    out, lse = torch.randn(2, OWN_HEADS * group.world_size, 4), torch.randn(2, 1)
    with pytest.raises(ValueError, match="lse"):
        exchange.reduce(out, lse, is_lse_base_on_e=True)
    with pytest.raises(TypeError, match="float16"):
        exchange.reduce(out, out[..., 0].half(), is_lse_base_on_e=True)
    with pytest.raises(ValueError, match=r"1 heads.*--dcp-size"):
        exchange.reduce(out[:, :1], out[:, :1, 0], is_lse_base_on_e=True)


OTHER_CHECKS = (
    check_agree,
    check_function,
    check_gather_heads,
    check_gather_rows,
    check_refuse,
)


class LoneGroup:
    world_size, rank_in_group = 1, 0


@pytest.mark.parametrize("name", EXCHANGES)
def test_one_rank_is_identity(name: str) -> None:
    exchange = create_exchange(name, LoneGroup())  # type: ignore[arg-type]
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    assert exchange.gather_heads(out) is out
    assert exchange.gather_rows(out) is out
    both = exchange.reduce(out, lse, is_lse_base_on_e=True)
    assert both[0] is out and both[1] is lse


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="--dcp-comm-backend nccl.*ag_rs, a2a"):
        create_exchange("nccl", LoneGroup())  # type: ignore[arg-type]


def run_ranks(world_size: int, folder: Path, *flags: str) -> list[dict[str, str]]:
    command = [sys.executable, __file__, "--worker", str(folder), *flags]
    processes = []
    for rank in range(world_size):
        with open(folder / f"stderr{rank}", "w") as stderr:
            env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size)}
            processes.append(
                subprocess.Popen(
                    command, env=env, stderr=stderr, start_new_session=True
                )
            )
    codes: list[int | None]
    try:
        codes = [process.wait(WORKER_TIMEOUT_S) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    tails = [(folder / f"stderr{r}").read_text()[-1500:] for r in range(world_size)]
    assert codes == [0] * world_size, "\n".join(map("rank {}: {}".format, codes, tails))
    return [
        json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(codes))
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache: dict[int, list[dict[str, str]]] = {}

    def of_world(world_size: int) -> list[dict[str, str]]:
        if world_size not in cache:
            folder = tmp_path_factory.mktemp(f"world{world_size}")
            # Remembered first: if the ranks hang, only one test waits for them.
            cache[world_size] = []
            cache[world_size] = run_ranks(world_size, folder)
        return cache[world_size]

    return of_world


@pytest.mark.parametrize("world_size", WORLDS, ids=lambda n: f"dcp{n}")
@pytest.mark.parametrize("name", [*CASES, *(check.__name__ for check in OTHER_CHECKS)])
def test_every_rank_gets_its_heads(name: str, world_size: int, results: Any) -> None:
    by_rank = results(world_size)
    assert by_rank, "the ranks of this world did not finish"
    assert [of_rank[name] for of_rank in by_rank] == [""] * world_size


def test_over_a_group_of_sglang(tmp_path: Path) -> None:
    """SGLang's own group on CPU, where some of its collectives have no kernel."""
    for of_rank in run_ranks(2, tmp_path, "--sglang"):
        assert of_rank and not any(of_rank.values()), of_rank


def sglang_group(world_size: int, rank: int) -> Any:
    """A group without any of the communicators that want a device."""
    from sglang.srt.distributed.parallel_state import init_world_group

    return init_world_group(list(range(world_size)), rank, "gloo")


def worker(folder: Path, over_sglang: bool) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    # Fresh tensors hold NaN: an element that no one writes shows.
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        # A file, since a free port may be taken before it is used.
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=WORKER_TIMEOUT_S),
    )
    group = (sglang_group if over_sglang else TorchGroup)(world_size, rank)
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    outcome = {}
    for name, case in CASES.items():
        outcome[name] = message_of(check_case, group, case)
    for check in OTHER_CHECKS:
        outcome[check.__name__] = message_of(check, group)
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


def message_of(check: Any, *args: Any) -> str:
    try:
        check(*args)
    except (AssertionError, pytest.fail.Exception) as error:
        return str(error) or "assertion failed"
    return ""


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(Path(sys.argv[2]), "--sglang" in sys.argv)
    else:
        sys.exit(pytest.main([__file__]))
