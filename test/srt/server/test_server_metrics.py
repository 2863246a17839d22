"""What live servers count: bytes, tokens and KV events, with DCP beside plain tp 2.

Only here do SGLang's reporter, its files of metrics and its event publisher meet a
scheduler with DCP.
"""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest
import zmq

from helpers.servers import READY_SECONDS, launched
from sglang_dcp.demo.client import greedy, http_json
from sglang_dcp.demo.server import ServerProcess, _fetch, _free_port_pair
from sglang_dcp.demo.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from sglang.srt.disaggregation.kv_events import BlockStored

pytestmark = [pytest.mark.server, pytest.mark.long]

INPUT, OUTPUT, PAGE, DCP = 1000, 200, 4, 2
PER_RANK = 1600
BASE = (
    f"--tp 2 --page-size {PAGE} --max-total-tokens {PER_RANK} "
    "--attention-backend torch_native --context-length 2048 "
    "--enable-metrics --enable-mfu-metrics --decode-log-interval 5 "
)
WORK = ("flops", "read_bytes", "write_bytes")


class Measured(NamedTuple):
    """Of one request: growth of the estimates, tokens seen in use, events, and state."""

    work: dict[str, float]
    used: set[float]
    usage: set[float]
    gauges: dict[str, float]
    info: dict[str, Any]
    metrics: str
    events: list[BlockStored]


def metrics_of(server: ServerProcess) -> str:
    body = _fetch(f"{server.base_url}/metrics")
    assert body is not None
    return body.decode()


def value(text: str, name: str) -> float:
    """The value of a metric, the same for every rank that reports it."""
    found = re.findall(rf"^sglang:{name}{{.*}} (\S+)$", text, re.MULTILINE)
    [one] = set(found)
    return float(one)


def work_of(text: str) -> dict[str, float]:
    return {name: value(text, f"estimated_{name}_per_gpu_total") for name in WORK}


class Subscriber:
    """Collects KV events of one publisher."""

    def __init__(self, port: int) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    def stored(self, seconds: float) -> list[BlockStored]:
        """`BlockStored` events until nothing comes for so long."""
        from sglang.srt.disaggregation.kv_events import BlockStored, KVEventBatch

        # Its events are arrays on one release, and maps on another.
        decoder: msgspec.msgpack.Decoder[KVEventBatch] = msgspec.msgpack.Decoder(
            KVEventBatch
        )
        events: list[BlockStored] = []
        while self._socket.poll(int(seconds * 1000)):
            batch = decoder.decode(self._socket.recv_multipart()[-1])
            events += [one for one in batch.events if isinstance(one, BlockStored)]
        return events

    def close(self) -> None:
        self._socket.close(linger=0)


def measure(server: ServerProcess, ids: Sequence[int], port: int) -> Measured:
    """Send one request, and look at the metrics while it runs."""
    subscriber = Subscriber(port)
    try:
        time.sleep(1)
        before = work_of(metrics_of(server))
        done = threading.Event()
        used: set[float] = set()
        usage: set[float] = set()

        def watch() -> None:
            while not done.wait(0.1):
                text = metrics_of(server)
                used.add(value(text, "num_used_tokens"))
                usage.add(value(text, "token_usage"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            [reply] = greedy(server.base_url, [ids], OUTPUT)
        finally:
            done.set()
            watcher.join()
        assert len(reply.ids) == OUTPUT
        text = metrics_of(server)
        after = work_of(text)
        events = subscriber.stored(3)
    finally:
        subscriber.close()
    names = ("max_total_num_tokens", "page_size", "num_pages", "context_len")
    return Measured(
        {name: after[name] - before[name] for name in WORK},
        used,
        usage,
        {name: value(text, name) for name in names},
        http_json(f"{server.base_url}/server_info"),
        text,
        events,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "llama-1kv", "llama-1kv")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    draw = random.Random(3)
    return [draw.randint(32, 126) for _ in range(INPUT)]


@pytest.fixture(scope="module")
def both(model: Path, ids: list[int]) -> Iterator[tuple[Measured, Measured]]:
    """The server with DCP, and plain tp 2."""
    ports = [_free_port_pair()[0] for _ in range(2)]
    # With a wildcard the publisher listens. Otherwise it connects to a subscriber.
    events = [
        json.dumps(
            {"publisher": "zmq", "endpoint": f"tcp://*:{port}"},
            separators=(",", ":"),
        )
        for port in ports
    ]
    flags = [f"{BASE} --kv-events-config {config}" for config in events]
    # A server of its own process each: prometheus reads its folder once.
    with (
        launched(model, f"{flags[0]} --dcp-size {DCP}", fresh=True) as dcp,
        launched(model, flags[1], fresh=True) as plain,
    ):
        found = []
        for server, port in zip((dcp, plain), ports):
            server.wait_ready(READY_SECONDS)
            found.append(measure(server, ids, port))
        yield found[0], found[1]


def test_a_rank_moves_at_most_what_plain_tp_moves(both: Any, model: Path) -> None:
    dcp, plain = both
    for name in WORK:
        print(f"{name}: DCP {dcp.work[name]:.6g}, plain tp 2 {plain.work[name]:.6g}")
    assert dcp.work["flops"] == pytest.approx(plain.work["flops"])
    assert dcp.work["read_bytes"] < plain.work["read_bytes"]
    assert dcp.work["write_bytes"] < plain.work["write_bytes"]
    # In fp32: K and V of one head, which plain tp holds on both ranks.
    config = json.loads((model / "config.json").read_text())
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    row = layers * 2 * head_dim * 4
    tokens = INPUT + OUTPUT
    saved = plain.work["write_bytes"] - dcp.work["write_bytes"]
    assert saved == pytest.approx(tokens * row * (1 - 1 / DCP), rel=0.01)
    read = sum(range(INPUT + 1, tokens + 1)) * row * (1 - 1 / DCP)
    heads = config["num_attention_heads"] // 2
    queries = OUTPUT * layers * heads * head_dim * 4 * (DCP - 1)
    saved = plain.work["read_bytes"] - dcp.work["read_bytes"]
    assert saved == pytest.approx(read - queries, rel=0.02)


def test_tokens_are_logical(both: Any) -> None:
    dcp, plain = both
    pages = PER_RANK // (PAGE * DCP)
    assert dcp.gauges["max_total_num_tokens"] == pages * PAGE * DCP * DCP
    assert dcp.gauges["page_size"] == PAGE * DCP
    assert dcp.gauges["num_pages"] == pages * DCP
    assert plain.gauges["max_total_num_tokens"] == PER_RANK
    assert dcp.gauges["context_len"] == plain.gauges["context_len"] == 2048
    for found in both:
        most = max(found.used)
        assert INPUT <= most <= INPUT + OUTPUT + 2 * PAGE * DCP, found.used
        part = most / found.gauges["max_total_num_tokens"]
        assert max(found.usage) == pytest.approx(part, abs=0.01)


def test_server_info_tells_the_layout(both: Any) -> None:
    dcp, plain = both
    assert (dcp.info["dcp_size"], dcp.info["attn_tp_size"]) == (DCP, 1)
    assert dcp.info["max_total_num_tokens"] == dcp.gauges["max_total_num_tokens"]
    [state] = dcp.info["internal_states"]
    shown = {
        name: state[name] for name in state if name.startswith(("dcp_", "attn_tp"))
    }
    assert shown["dcp_size"] == DCP and shown["attn_tp_size"] == 1
    assert shown["dcp_comm_backend"] == shown["dcp_exchange_in_use"] == "ag_rs"
    assert shown["dcp_exchange_fallbacks"] == {}
    assert shown["dcp_attention_memory_bytes"] > 0
    assert 'sglang:dcp_info{attn_tp_size="1"' in dcp.metrics
    assert 'exchange_in_use="ag_rs"' in dcp.metrics
    assert "dcp_info" not in plain.metrics and "fallbacks" not in plain.metrics
    assert plain.info["dcp_size"] == 1


@pytest.mark.parametrize("index", [0, 1], ids=["dcp", "plain"])
def test_kv_events_are_of_logical_pages(index: int, both: Any, ids: list[int]) -> None:
    found, page = both[index], PAGE * (DCP, 1)[index]
    assert found.info["kv_events"]["block_size"] == page
    assert {event.block_size for event in found.events} == {page}
    published = [token for event in found.events for token in event.token_ids]
    whole = INPUT // page * page
    assert published[:whole] == ids[:whole]
    assert (
        len(published) == sum(len(event.block_hashes) for event in found.events) * page
    )
    assert whole < len(published) <= INPUT + OUTPUT


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
