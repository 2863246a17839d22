"""`python -m sglang_dcp status` and `record`: the commands that import SGLang."""

from __future__ import annotations

from sglang_dcp.config import DcpConfigError
from sglang_dcp.releases.installed import sglang_version


def status() -> int:
    """Print every hook and its state. Return 0 if a server with DCP flags would start."""
    from sglang.srt.plugins import load_plugins

    from sglang_dcp.hooks.table import active_hooks
    from sglang_dcp.hooks.verify import (
        drifted_reliances,
        hook_states,
        problems,
    )

    load_plugins()
    print(f"sglang {sglang_version()}")
    try:
        states = hook_states(active_hooks())
    except DcpConfigError as error:
        print(error)
        return 1
    for state in states:
        print(f"{state.state:<10} {state.hook.name:<24} {state.hook.target}")
    found = problems(states) + drifted_reliances()
    names = [state.state for state in states]
    counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
    print(f"{len(states)} hooks: {counts}")
    for line in found:
        print(line)
    return 1 if found else 0


def record() -> int:
    """Record the hashes of the installed SGLang, which is a new release or a fork.

    Return 1, and write nothing, for a release that `sglang_api` has no functions for.
    """
    from sglang_dcp.releases.api import is_served, served_numbers

    version = sglang_version()
    if not is_served(version):
        print(
            f"sglang {version} cannot be recorded: this sglang-dcp has functions for "
            f"{', '.join(served_numbers())} only; follow 'Move to a new SGLang release' "
            "in CONTRIBUTING.md"
        )
        return 1
    from sglang_dcp.hooks import verify
    from sglang_dcp.hooks.table import CPU_HOOKS, HOOKS, relied_files, rows_of
    from sglang_dcp.releases import (
        FileHashes,
        Release,
        UnknownRelease,
        load_release,
        write_release,
    )

    root = verify.package_root()
    paths = {verify.target_file(hook) for hook in rows_of(HOOKS + CPU_HOOKS)}
    paths |= {root / name for name in relied_files()}
    found = {
        path.relative_to(root).as_posix(): FileHashes(verify.file_hash(path))
        for path in paths
    }
    try:
        known = load_release(version)
    except UnknownRelease:
        known = Release(version, {}, {}, {})
    # A file that is unchanged keeps the hash of its patched form too.
    kept = {
        name: hashes
        for name, hashes in known.files.items()
        if name not in found or found[name].original == hashes.original
    }
    path = write_release(known._replace(files={**found, **kept}))
    print(f"{path.name}: {len({**found, **kept})} files")
    return 0
