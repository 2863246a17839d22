"""Table, CSV and plot of `bench_exchange.py`.

    python benchmark/exchange_report.py results.csv [plot.png]

draws a CSV again: microseconds over bytes of partial output, one panel per shape. The plot
needs matplotlib (`pip install '.[bench]'`), no GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# tokens, query heads of the DCP group, head dim
Size = tuple[int, int, int]
BYTES_A_VALUE = 2
# A column over the sum of others, where all were measured.
RATIOS = {
    "symm/a2a": ("symm_a2a", ("a2a",)),
    "symm/nvlink": ("symm_a2a", ("nvlink",)),
    "symm-q/nccl": ("symm-gather-q", ("nccl-all-gather",)),
    "symm-q/nvlink": ("symm-gather-q", ("nvlink-q",)),
    "a2a/(raw+launch)": ("a2a", ("raw-a2a", "launch")),
    "symm/upstream-a2a": ("symm_a2a", ("upstream-a2a",)),
    "a2a/upstream-a2a": ("a2a", ("upstream-a2a",)),
    "upstream/ag_rs": ("upstream", ("ag_rs",)),
    "upstream-mla/ag_rs": ("upstream-mla", ("ag_rs",)),
}
DRAWN = ("ag_rs", "a2a", "symm_a2a", "nvlink")
DRAWN_Q = ("nccl-all-gather", "symm-gather-q", "nvlink-q")


class Timing(NamedTuple):
    """Microseconds a call, of the slowest rank, over the replays of the faster round."""

    median: float
    p95: float
    spread: float  # by how much of it the other round's median was longer
    calls: int  # of the graph

    @classmethod
    def of(cls, rounds: Sequence[tuple[float, float]], calls: int) -> Timing:
        """From median and 95th percentile of each round."""
        median, p95 = min(rounds)
        return cls(median, p95, max(rounds)[0] / median - 1, calls)

    def later(self, us: float) -> Timing:
        return self._replace(median=self.median + us, p95=self.p95 + us)


Row = Mapping[str, Timing]


def partial_bytes(size: Size) -> int:
    """Of one rank's partial output of all heads, in bf16."""
    tokens, heads, dim = size
    return BYTES_A_VALUE * tokens * heads * dim


def sent_bytes(size: Size, world_size: int) -> int:
    """What a rank must send of partial output and LSE in an exchange."""
    tokens, heads, _ = size
    all_heads = partial_bytes(size) + 4 * tokens * heads
    return all_heads * (world_size - 1) // world_size


def sent_bytes_q(size: Size, world_size: int) -> int:
    """What a rank must send for the others to have its query heads."""
    return partial_bytes(size) * (world_size - 1) // world_size


def ratios(row: Row) -> dict[str, str]:
    return {
        name: f"{row[above].median / sum(row[b].median for b in below):.2f}"
        for name, (above, below) in RATIOS.items()
        if row.keys() >= {above, *below}
    }


def print_table(title: str, results: Mapping[Size, Row]) -> None:
    print(f"{title}; us a call: median/p95 +longer median of the other round")
    lines: list[tuple[str, ...]] = []
    for size, row in results.items():
        tokens, heads, dim = size
        shape = {
            "tokens": str(tokens),
            "heads x dim": f"{heads} x {dim}",
            "KiB": str(partial_bytes(size) // 1024),
        }
        times = {
            name: f"{t.median:.2f}/{t.p95:.2f} +{100 * t.spread:.0f}%"
            for name, t in row.items()
        }
        # What is read first is first: long lines may be cut.
        cells = {**shape, **ratios(row), **times}
        lines = lines or [tuple(cells)]
        lines.append(tuple(cells.values()))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print(" | ".join(map(str.rjust, line, widths)))


def stamp(world_size: int, rate: float) -> dict[str, Any]:
    """What a CSV says of the machine and the software, in each line."""
    import torch

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "sglang": version("sglang"),
        "nccl_graph_mixing": os.environ.get("NCCL_GRAPH_MIXING_SUPPORT", "default"),
        "dcp_size": world_size,
        "dtype": "bfloat16",
        "peer_copy_gb_s": f"{rate / 1e9:.1f}",
    }


def write_csv(
    path: Path, stamp: Mapping[str, Any], results: Mapping[Size, Row]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = (*stamp, "tokens", "heads", "dim", "bytes", "operation")
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow((*head, "median_us", "p95_us", "spread", "calls"))
        for size, row in results.items():
            for name, timing in row.items():
                times = f"{timing.median:.2f}", f"{timing.p95:.2f}"
                what = (*size, partial_bytes(size), name)
                more = f"{timing.spread:.3f}", timing.calls
                table.writerow((*stamp.values(), *what, *times, *more))


def plot(path: Path, png: Path) -> None:
    """Draw the CSV at `path`: the exchange above, the gather of the queries below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    shapes = sorted({(int(r["heads"]), int(r["dim"])) for r in records})
    figure, panels = pyplot.subplots(
        2, len(shapes), figsize=(5.2 * len(shapes), 7.6), squeeze=False
    )
    for row, names in zip(panels, (DRAWN, DRAWN_Q)):
        for panel, (heads, dim) in zip(row, shapes):
            own = [
                r for r in records if (r["heads"], r["dim"]) == (str(heads), str(dim))
            ]
            _panel(panel, own, names)
            panel.set_title(f"{heads} heads x {dim}")
        row[0].set_ylabel("us a call (median)")
    first = records[0]
    figure.suptitle(
        f"DCP {first['dcp_size']}, {first['gpu']}, {first['dtype']}, CUDA graphs; "
        f"peer copy {first['peer_copy_gb_s']} GB/s"
    )
    figure.tight_layout()
    figure.savefig(png, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, records: Sequence[dict[str, str]], names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        rows = sorted((int(r["bytes"]), r) for r in records if r["operation"] == name)
        panel.plot(
            [size / 1024 for size, _ in rows],
            [float(r["median_us"]) for _, r in rows],
            label=f"{name} (floor)" if name.startswith("nvlink") else name,
            linestyle="--" if name.startswith("nvlink") else "-",
            color="0.4" if name.startswith("nvlink") else f"C{number}",
            marker="osD^"[number],
            markersize=4,
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xlabel("partial output of a rank, all heads: KiB")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)


def plot_beside(path: Path) -> None:
    """The plot beside the CSV, where matplotlib is."""
    if find_spec("matplotlib"):
        plot(path, path.with_suffix(".png"))
    else:
        print("no plot: matplotlib is missing", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path, nargs="?", help="default: beside the CSV")
    options = parser.parse_args(argv)
    plot(options.csv, options.png or options.csv.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
