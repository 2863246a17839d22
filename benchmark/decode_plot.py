"""Plot of decode steps over context length from a CSV of `bench_decode.py`.

    python benchmark/decode_plot.py results.csv [plot.png]

One panel per batch size, one line per layout. It needs matplotlib, and no GPU: `pip install
'.[bench]'`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decode_quantization import PLAIN
from decode_report import Record, read, unique

MARKERS = "osD^vP*X"


def label(record: Record) -> str:
    """What the legend calls a layout."""
    if record["dcp_size"] == "1":
        return f"tp {record['tp']}, no DCP"
    if record["comm"] == "upstream":
        return f"SGLang's DCP {record['dcp_size']}, {record['attention']}"
    return f"DCP {record['dcp_size']}, {record['comm']}, Q {record['q']}"


def plot(records: Sequence[Record], png: Path) -> None:
    """Draw `records` into `png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    batches = [batch for (batch,) in unique(records, "batch")]
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=(4.4 * len(batches), 4.4), squeeze=False
    )
    for panel, batch in zip(panels[0], batches):
        _panel(panel, [r for r in records if r["batch"] == batch], f"batch {batch}")
    panels[0][0].set_ylabel("decode step, ms (median)")
    handles, names = panels[0][0].get_legend_handles_labels()
    columns = min(len(names), 1 + len(batches))
    figure.legend(handles, names, loc="lower center", ncols=columns, frameon=False)
    first = records[0]
    figure.suptitle(
        f"{first['model']} dimensions, {first.get('weights', PLAIN)}, "
        f"{first['tp']} x {first['gpu']}, "
        f"{first['attention']}, page {first['page']}"
    )
    below = 0.02 + 0.06 * -(-len(names) // columns)
    figure.tight_layout(rect=(0, below, 1, 1))
    figure.savefig(png, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, records: Sequence[Record], title: str) -> None:
    contexts = sorted({int(r["context"]) for r in records})
    for number, (name,) in enumerate(unique(records, "name")):
        rows = [r for r in records if r["name"] == name]
        fits = [r for r in rows if r["median_ms"]]
        panel.plot(
            [int(r["context"]) for r in fits],
            [float(r["median_ms"]) for r in fits],
            label=label(rows[0]),
            color=f"C{number}",
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            # What everything is compared with stands out.
            linewidth=2.4 if rows[0]["dcp_size"] == "1" else 1.4,
        )
    layouts = len(unique(records, "name"))
    missing = [r for r in records if not r["median_ms"]]
    for number, (context,) in enumerate(unique(missing, "context")):
        names = [label(r) for r in missing if r["context"] == context]
        who = "" if len(names) == layouts else f" for {'; '.join(names)}"
        at = (0.03, 0.95 - 0.06 * number)
        text = f"{int(context) // 1024}K does not fit{who}"
        panel.annotate(text, at, xycoords="axes fraction", va="top", fontsize=8)
    panel.set_title(title)
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [f"{context // 1024}K" for context in contexts])
    panel.minorticks_off()
    panel.set_xlabel("context, tokens a request")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path, nargs="?", help="default: beside the CSV")
    options = parser.parse_args(argv)
    png = options.png or options.csv.with_suffix(".png")
    plot(read(options.csv), png)
    print(f"{png}: {png.stat().st_size // 1024} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
