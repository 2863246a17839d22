"""`patches/README.md`, made from the headers of the patches."""

from __future__ import annotations

from pathlib import Path

from sglang_dcp.patch.header import read_header
from sglang_dcp.patch.manifest import folder_of, load_series, read_series, versions

_TOP = """# Patches

Made by `python -m sglang_dcp patch export`; do not edit.

For forks of SGLang, and for whoever wants the seams of `python/sglang_dcp/seams.py` in SGLang's
source instead of hooks. Each patch writes calls of the installed `sglang_dcp` into SGLang; none
makes a file. The `fix-` patches call nothing and stand alone.

```
python -m sglang_dcp patch status|check|apply|revert [--target DIR]
git am $(sed 's|^|.../patches/VERSION/|' .../patches/VERSION/series)    # in a checkout's root
```

DIR is an environment, its site-packages, or a checkout; without it, the SGLang that Python
imports. `apply` and `revert` change all files or none, know each by its hash, and may be killed:
run either again. A patched SGLang needs sglang-dcp installed, but no plugin: `patch revert` comes
before `pip uninstall sglang-dcp`. Without DCP flags it runs as unpatched, but for the fixes, and
`--dcp-size` is ours. A fork whose files are not the release's applies the series with git, and
then records its own hashes with `python -m sglang_dcp write-manifest`.

To change the series: `patch import DIR` makes a checkout of the installed release with a commit
for each patch; amend or rebase there, then `patch export --target DIR --wheel FILE` with the
release's wheel. `patch lint` checks the result.
"""


def render_readme() -> str:
    """The text for every series."""
    return _TOP + "".join(_section(folder_of(version)) for version in versions())


def _section(folder: Path) -> str:
    series = load_series(folder)
    lines = [
        f"\n## SGLang {series.version}: {len(series.files)} files\n",
        "| patch | what changes | why | remove when |",
        "|---|---|---|---|",
    ]
    for name in read_series(folder):
        header = read_header(name, (folder / name).read_bytes())
        why = header["Why"].replace("|", "\\|")
        cells = (f"`{name}`", header["Subject"], why, header["Remove-when"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
