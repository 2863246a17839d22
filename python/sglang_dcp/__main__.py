"""`python -m sglang_dcp`: `status` of every seam, and `patch` for forks of SGLang."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sglang_dcp.config import DcpConfigError


def status() -> int:
    """Print every seam of this machine; 0 where a server with DCP flags would start."""
    from sglang.srt.plugins import load_plugins

    from sglang_dcp.seams import active_seams
    from sglang_dcp.verify import (
        drifted_reliances,
        problems,
        seam_states,
        sglang_version,
    )

    load_plugins()
    print(f"sglang {sglang_version()}")
    try:
        states = seam_states(active_seams())
    except DcpConfigError as error:
        print(error)
        return 1
    for state in states:
        print(f"{state.state:<10} {state.seam.name:<24} {state.seam.target}")
    found = problems(states) + drifted_reliances()
    names = [state.state for state in states]
    counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
    print(f"{len(states)} seams: {counts}")
    for line in found:
        print(line)
    return 1 if found else 0


def write_manifest() -> int:
    """Record the installed SGLang's files: a new release's wheel, or a fork's own."""
    from sglang_dcp import verify
    from sglang_dcp.seams import CPU_SEAMS, RELIES_ON, SEAMS

    root = verify.package_root()
    paths = {verify.seam_file(seam) for seam in SEAMS + CPU_SEAMS}
    paths |= {root / name for name in RELIES_ON}
    files = {
        path.relative_to(root).as_posix(): verify.file_hash(path)
        for path in sorted(paths)
    }
    target = (
        Path(verify.__file__).parent / "manifests" / f"{verify.sglang_version()}.json"
    )
    target.parent.mkdir(exist_ok=True)
    text = json.dumps({"sglang": verify.sglang_version(), "files": files}, indent=2)
    target.write_text(text + "\n")
    print(f"{target.name}: {len(files)} files")
    return 0


def main() -> int:
    """Command line of the package."""
    if sys.argv[1:2] == ["patch"]:
        from sglang_dcp.patch.cli import main as patch

        return patch(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m sglang_dcp", description=__doc__)
    commands = {"status": status, "write-manifest": write_manifest}
    parser.add_argument("command", choices=[*commands, "patch"])
    return commands[parser.parse_args().command]()


if __name__ == "__main__":
    sys.exit(main())
