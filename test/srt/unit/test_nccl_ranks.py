"""`nccl_ranks.Ranks` itself: a rank that dies or hangs takes down its own cases, not those before.

Only this file sees whether a run that is cut off still tells what passed, and whether a rank
that ends badly after its last case is noticed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from helpers import nccl_ranks
from helpers.gloo_ranks import Outcomes
from helpers.nccl_ranks import Ranks

CASES = ("a", "b", "c")
HOW = "RANKS_TEST_HOW"


def outcomes(rank: int, folder: Path) -> Outcomes:
    """Rank 1 does as it is told."""
    how = os.environ[HOW] if rank == 1 else "well"
    yield "a", ""
    yield "b", "b is wrong" if how == "wrong" else ""
    # Ranks are never a collective apart.
    while rank == 1 and "b" not in nccl_ranks.read_outcomes(folder, 0):
        time.sleep(0.05)
    if how == "hang":
        time.sleep(600)
    if how == "die":
        os._exit(7)
    yield "c", ""
    if how == "badly":
        sys.exit(3)


def run_worker(folder: Path) -> int:
    rank = int(os.environ["RANK"])
    nccl_ranks.record(outcomes(rank, folder), folder, rank)
    if rank == 0 and os.environ[HOW] in ("die", "hang"):
        # In a collective with the one that is gone.
        time.sleep(600)
    return 0


def verdicts(ranks: Ranks) -> dict[str, str]:
    found = {}
    for name in CASES:
        try:
            ranks.assert_passed(name)
            found[name] = ""
        except pytest.fail.Exception as failed:
            found[name] = str(failed)
    return found


def test_all_passed(tmp_path: Path) -> None:
    found = verdicts(Ranks(__file__, 2, tmp_path, **{HOW: "well"}))
    assert found == dict.fromkeys(CASES, "")


def test_a_wrong_case_is_told_by_rank(tmp_path: Path) -> None:
    found = verdicts(Ranks(__file__, 2, tmp_path, **{HOW: "wrong"}))
    assert (found["a"], found["c"]) == ("", "")
    assert found["b"] == "rank 0: \nrank 1: b is wrong"


def test_a_rank_that_dies_fails_what_it_said_last_and_the_rest(tmp_path: Path) -> None:
    found = verdicts(Ranks(__file__, 2, tmp_path, **{HOW: "die"}))
    assert found["a"] == ""
    assert all("rank 1, exit status 7" in found[name] for name in "bc")


def test_a_rank_that_ends_badly_fails_the_last_case(tmp_path: Path) -> None:
    found = verdicts(Ranks(__file__, 2, tmp_path, **{HOW: "badly"}))
    assert (found["a"], found["b"]) == ("", "")
    assert "rank 1, exit status 3" in found["c"]


def test_a_rank_that_hangs_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time enough to import, and to get to the case that hangs.
    monkeypatch.setenv("SGLANG_DCP_TEST_RANKS_S", "20")
    ranks = Ranks(__file__, 2, tmp_path, **{HOW: "hang"})
    began = time.monotonic()
    ranks.assert_passed("a")
    # As soon as it is known: nothing waits for the rank that hangs.
    assert time.monotonic() - began < 18
    found = verdicts(ranks)
    assert found["a"] == "" and "exit status -9" in found["b"] and found["c"]
    assert all(rank.poll() is not None for rank in ranks._ranks)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(run_worker(Path(sys.argv[2])))
    sys.exit(pytest.main([__file__]))
