#!/usr/bin/env bash
# Builds wheel and sdist, installs the wheel into a fresh environment and runs the command line
# from it. SGLang itself comes from the environment of the tests, which is 9 GB.
#
#   .ci/wheel.sh BIN      BIN: bin/ of the environment with SGLang and uv
set -euo pipefail
bin=$(realpath "$1")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# From a copy: a build leaves folders in the tree.
git archive HEAD | tar -xC "$work" --one-top-level=source
"$bin/uv" build -q --out-dir "$work/dist" "$work/source"
ls "$work/dist"
"$bin/uv" venv -q --python "$bin/python" "$work/fresh"
"$bin/uv" pip install -q --python "$work/fresh/bin/python" --no-deps "$work"/dist/*.whl
fresh=$work/fresh/bin/python
cd "$work"

# Without torch or SGLang.
"$fresh" -m sglang_dcp --version
"$fresh" -m sglang_dcp patch lint
# With SGLang, whose environment comes after this one's own packages.
site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$fresh" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import sys; sys.path.append('$site')" >"$own/sglang.pth"
"$fresh" -m sglang_dcp patch status
"$fresh" -c "import sglang_dcp, sys; sys.exit(not sglang_dcp.__file__.startswith('$own'))"
"$fresh" -m sglang_dcp status | tail -1
echo "wheel: installed, status and patch commands ran"
