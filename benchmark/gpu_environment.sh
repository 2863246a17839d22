# shellcheck shell=bash
# Sourced by run_gpu.sh and gpu_lanes.sh, from the repository's root: what SGLang's processes get on
# a GPU machine. SITE and RELEASE are as in run_gpu.sh.
unset PYTHONDONTWRITEBYTECODE
overlay=${RELEASE:+$SITE-$RELEASE}
export PYTHONPATH=${overlay:+$overlay:}$SITE:$PWD/python:$PWD/test/srt:$PWD/benchmark
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
if [[ -n $overlay ]]; then
  # The stack's kernels are older than the release asks for, and its FlashInfer has no
  # `autotune_v2`. The release's radix tree in Rust is built for another torch.
  export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python
  export SGLANG_DCP_TEST_SERVER_FLAGS=${SGLANG_DCP_TEST_SERVER_FLAGS---disable-flashinfer-autotune}
  # The release imports FlashMLA in servers with a draft model, and the stack has none. What the
  # image has would come behind this folder, what SITE gets comes before it.
  python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("flash_mla") is not None)' &&
    export PYTHONPATH=$PYTHONPATH:$PWD/benchmark/stand_ins
fi
# By default in /tmp, from where `caches` would not take it.
export TORCHINDUCTOR_CACHE_DIR=$HOME/.cache/torchinductor
# As of 0.5.23 SGLang has FlashInfer look elsewhere than CACHE was unpacked to.
export FLASHINFER_WORKSPACE_BASE=$HOME
