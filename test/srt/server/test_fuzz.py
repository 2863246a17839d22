"""200 random mixes of requests against live servers: nothing lost, nothing wrong.

Only here do aborts, lost connections, pauses, retractions, evictions, preemption and all
sampling parameters meet in one server. The reference is tp 1, which gets each request
alone. `make fuzz` runs more mixes on more servers.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from fuzz import rest
from fuzz.client import Client
from fuzz.drive import Result, drive
from fuzz.mixes import make_mix
from fuzz.servers import REFERENCE, SETTINGS, Setting, live

pytestmark = [pytest.mark.server, pytest.mark.long]

# Setting, and its seeds.
RUNS = {
    "llama-a2a-page1-mixed": range(0, 100),
    "mla-ag_rs-page4-mixed-no-overlap": range(100, 200),
}


@pytest.mark.parametrize("name", RUNS)
def test_mixes(name: str, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    commands = setting.flags, REFERENCE
    with live(setting.kind, commands, tmp_path, setting.door) as servers:
        urls = [server.base_url for server in servers]
        result = asyncio.run(_drive(setting, urls[0], urls[1], RUNS[name]))
        trouble = rest.log_trouble(servers[0].log_path)
    print(f"{name}: {result.mixes} mixes, {result.counts}")
    assert not result.failed, "\n".join(
        f"seed {mix.seed}: {fault}" for mix, faults in result.failed for fault in faults
    )
    assert not trouble
    assert result.mixes == len(RUNS[name])
    # The mixes did what they are for.
    assert result.counts.tokens > 1000 and result.counts.cut and result.counts.refused
    assert result.counts.retracted


async def _drive(setting: Setting, tested: str, reference: str, seeds: range) -> Result:
    async with Client(tested) as under_test, Client(reference) as alone:
        mixes = [make_mix(seed, setting.limits()) for seed in seeds]
        return await drive(under_test, alone, setting, mixes)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
