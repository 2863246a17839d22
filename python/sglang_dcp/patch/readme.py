"""Makes `patches/README.md` from the headers of the patches."""

from __future__ import annotations

from sglang_dcp.patch.header import read_header
from sglang_dcp.patch.manifest import folder_of, load_series, read_series, versions

_TOP = """# Patches

Made by `python -m sglang_dcp patch export`; do not edit.

The patches are for forks of SGLang. They write the hooks of
`python/sglang_dcp/hooks/table.py` into SGLang's source, so that no plugin is needed. Each
patch adds calls of the installed `sglang_dcp`; none adds a file. The `fix-` patches call
nothing and stand alone.

```
python -m sglang_dcp patch status|check|apply|revert [--target DIR]
git am $(sed 's|^|.../patches/VERSION/|' .../patches/VERSION/series)    # in a checkout's root
```

DIR is an environment, its site-packages, or a checkout. Without it, the tool takes the
SGLang that Python imports. `apply` and `revert` change all files or none, and know each
file by its hash. If a run was killed, run either again.

A patched SGLang needs sglang-dcp installed, but no plugin. Run `patch revert` before
`pip uninstall sglang-dcp`. Without DCP flags a patched SGLang runs as an unpatched one
with the fixes. `--dcp-size` is then the flag of this package.

The files of a fork may differ from the release's. Apply the series with git there, then
record the fork's hashes with `python -m sglang_dcp record`.

To change the series, run `patch import DIR`. It makes a checkout of the installed release
with a commit for each patch. Amend or rebase there. Then run `patch export --target DIR
--wheel FILE` with the release's wheel. `patch lint` checks the result.
"""


def render_readme() -> str:
    """Return the text of the page, with a table for every series."""
    return _TOP + "".join(_section(version) for version in versions())


def _section(version: str) -> str:
    series, folder = load_series(version), folder_of(version)
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
