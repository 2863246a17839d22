#!/usr/bin/env bash
# On a GPU machine without network: unpack SGLang, run GPU tests, measure. A run ends by itself
# within LIMIT seconds. Its logs are in $OUT/logs.tgz, which is rewritten as they grow. So a run
# that is killed leaves them too. Variables:
#   SITE   folder for what is unpacked (required), on PYTHONPATH before what the image has
#   STACK  archive of SGLang and what it needs beside torch, unpacked into SITE
#   DIST   archive of this package's dist-info, with its entry point, unpacked into SITE
#   CACHE  archives of compiled kernels, unpacked into $HOME; they name SITE by its path
#   FA3    archive of FlashAttention-3, unpacked into SITE
#   OVERLAY  archive of a newer SGLang's sources, unpacked beside SITE, into SITE-RELEASE
#   TRAINED  archives that together hold the GGUF file of a trained model, cut into parts. Several
#          runs may bring one each. `accuracy` needs all of them
#   AOT    archive of aot/NAME/NAME.so, FlashInfer's kernels compiled elsewhere
#          (docs/architecture.md)
#          Each archive is unpacked once. Several runs may bring some of them each.
#   RELEASE  of OVERLAY: this SGLang runs, with the rest of STACK; without it STACK's own does
#   WARM   kinds for test/srt/helpers/warm_flashinfer.py, compiled once, in the background, also of
#          the next run; servers and what is timed wait for them
#   OUT    folder for logs.tgz (required)
#   PARTS  which of
#            kernels exchange symm backends latents    tests of kernels, beside each other
#            server bf16 graphs mla dtypes fused weights quant limits   live servers, one after the other
#            reports sleep long speculation            the same: public reports, memory saver,
#                                                      prompts of 131,071 to 200,000 tokens,
#                                                      speculation (choose its cases with K)
#            accuracy                                  perplexity and greedy replies of a trained
#                                                      model (eval_accuracy.py), servers side by side
#            bench decode fill off serving prefill bench-speculation   timed, one after the other;
#                                                      the last one needs RELEASE=0.5.23
#            caches                                    what was compiled on the way, into
#                                                      $OUT/caches.tar.xz: a next CACHE
#          none: only unpack; default: the first four
#   SGLANG_DCP_TEST_RANKS_PER_GPU  2 or 4: so many ranks may share a GPU (test/srt/README.md). Times mean
#          nothing then
#   K      words of cases for pytest -k, in the groups of live servers
#   ACCURACY_ARGS DECODE_ARGS SERVING_ARGS PREFILL_ARGS SPECULATION_ARGS BENCH_ARGS   options of the
#                                                      benchmarks
#   MIXING which values of NCCL_GRAPH_MIXING_SUPPORT `bench` measures with
#   LIMIT  seconds of the whole run (550)
set -uo pipefail
cd "$(dirname "$0")/.."
: "${SITE:?}" "${OUT:?}"
# The stack's own release would run, and pass for the newer one.
[[ -z ${OVERLAY:-} ]] || : "${RELEASE:?}"
PARTS=${PARTS-kernels exchange symm backends}
LIMIT=${LIMIT:-550}
SERVING_ARGS=${SERVING_ARGS:---concurrency 8 --input-lens 4096}
# shellcheck source=benchmark/gpu_environment.sh
source benchmark/gpu_environment.sh
began=$SECONDS
work=/tmp/gpu-run-$$
logs=$work/logs
mkdir -p "$logs"

# What ended badly decides the exit status: kept in a file, since tests run in subshells.
failed() { echo "$1" >>"$work/failed"; }
say() { echo "[$((SECONDS - began)) s] $*" | tee -a "$logs/progress.log"; }
wanted() { [[ " $PARTS " == *" $1 "* ]]; }
# Seconds that a part may take: its own limit, or what is left of the run.
left() {
  local rest=$((LIMIT - 20 - (SECONDS - began)))
  echo $(($1 < rest ? $1 : rest > 1 ? rest : 1))
}

pack() {
  (
    flock 9
    # What servers and ranks of the tests said, without their models.
    (cd "$work" && find tests -type f \( -name '*.log' -o -name 'stderr*' -o -name '*.jsonl' \) \
      2>/dev/null | tar -czf pack.tgz --ignore-failed-read --warning=no-file-changed \
      --exclude='*-TP-[1-9]*.trace.json.gz' -T - logs)
    mv "$work/pack.tgz" "$OUT/logs.tgz"
  ) 9>"$work/lock"
}
keep_packing() { while sleep 20; do pack; done; }
# Not to the terminal, which would stay open as long as its sleep.
keep_packing >/dev/null 2>&1 &
packer=$!
trap 'kill $packer; pack' EXIT

unpack() {
  local archive=$1 folder=$2
  local mark=$SITE/.unpacked-${archive##*/}
  if [[ -z $archive || -e $mark ]]; then return; fi
  mkdir -p "$folder" && tar -C "$folder" -xf "$archive" && touch "$mark" &&
    say "unpacked $archive" || failed "unpacking $archive"
}
mkdir -p "$SITE"
unpack "${STACK:-}" "$SITE"
unpack "${DIST:-}" "$SITE"
for archive in ${CACHE:-}; do unpack "$archive" "$HOME"; done
unpack "${FA3:-}" "$SITE"
unpack "${AOT:-}" "$SITE/flashinfer/data"
for archive in ${TRAINED:-}; do unpack "$archive" "$SITE/trained"; done
[[ -z $overlay ]] || unpack "${OVERLAY:-}" "$overlay"
for folder in "$SITE" $overlay; do
  if [[ ! -e $folder/.compiled && -d $folder/sglang ]]; then
    # Many processes import SGLang at once: compile it once before.
    python3 -m compileall -q -j 0 "$folder" >/dev/null 2>&1
    touch "$folder/.compiled"
    say "compiled $folder"
  fi
done
if [[ -n $overlay ]]; then
  # Also where a later call names RELEASE and no earlier one unpacked it.
  found=$(python3 -c 'import importlib.metadata as m; print(m.version("sglang"))')
  [[ $found == "$RELEASE" ]] || { say "SGLang is $found, not $RELEASE"; exit 1; }
fi

if [[ -n ${WARM:-} && ! -e $SITE/.warming ]]; then
  touch "$SITE/.warming"
  # A copy, since the next call brings another working tree; and no job of this shell, which
  # waits for its jobs.
  cp test/srt/helpers/warm_flashinfer.py "$SITE"
  # shellcheck disable=SC2086
  (setsid bash -c 'python3 "$0/warm_flashinfer.py" "$@" >"$0/.warm.log" 2>&1
    echo "status $?, $SECONDS s" >"$0/.warmed"' "$SITE" $WARM </dev/null >/dev/null 2>&1 &)
fi
# What WARM names is compiled, or could not be.
warmed() {
  [[ -e $SITE/.warming && ! -e $SITE/.warm-told ]] || return 0
  until [[ -e $SITE/.warmed ]]; do sleep 1; done
  touch "$SITE/.warm-told"
  cp "$SITE/.warm.log" "$logs/warm.log"
  say "kernels compiled: $(cat "$SITE/.warmed")"
  grep -q '^status 0,' "$SITE/.warmed" || failed warm
}

# INT, so that pytest ends its servers and says what passed until then; a shell's background
# jobs would ignore it.
run_tests() {
  local name=$1 limit
  limit=$(left "$2")
  shift 2
  SGLANG_DCP_TEST_RANKS_S=$((limit > 40 ? limit - 30 : 10)) \
    timeout -s INT -k 15 "$limit" env --default-signal=INT python3 -m pytest -q -p no:cacheprovider --durations=5 \
    --basetemp="$work/tests/$name" "$@" >"$logs/$name.log" 2>&1
  local status=$?
  if ((status)); then failed "$name"; fi
  say "$name ended with $status"
  grep -E "ratio [0-9]|max \|d|^(FAILED|ERROR)|passed|failed|error" "$logs/$name.log" |
    tail -12 | cut -c1-400
}

tests=test/srt/gpu/test_
# None of these is timed, so they share the machine.
mkdir -p "$work/tests"
kernels() {
  wanted kernels && run_tests kernels 200 -n 8 \
    ${tests}lse_merge_gpu.py ${tests}partials_gpu.py ${tests}local_batch_gpu.py &
  wanted exchange && run_tests exchange 240 ${tests}exchange_gpu.py &
  wanted symm && run_tests symm 300 ${tests}symm_a2a_gpu.py ${tests}symm_a2a_ranks_gpu.py &
  wanted backends && run_tests backends 300 ${tests}backends_gpu.py &
  wanted latents && run_tests latents 500 -n 6 ${tests}backends_mla_gpu.py ${tests}mla_prefill_gpu.py &
  local job
  for job in $(jobs -p); do if [[ $job != "$packer" ]]; then wait "$job"; fi; done
}
kernels

# A start is mostly work of the host: beside compilers or other groups it takes minutes.
run_servers() {
  local name=$1 limit=$2 file=$3
  if wanted "$name"; then warmed; fi
  wanted "$name" && run_tests "$name" "$limit" -s ${K:+-k "$K"} "${tests}${file}.py"
  pack
}
run_servers server 270 server_gpu
run_servers bf16 530 server_gpu_bf16
run_servers graphs 530 server_gpu_prefill_graphs
run_servers mla 530 server_gpu_mla
run_servers dtypes 200 server_gpu_dtypes
run_servers fused 200 server_gpu_fused_write
run_servers weights 530 server_gpu_weights
run_servers quant 530 server_gpu_quant
run_servers reports 530 server_gpu_reports
run_servers sleep 530 server_gpu_memory_saver
run_servers long 530 server_gpu_long
run_servers speculation 530 server_gpu_speculation
run_servers limits 530 server_gpu_limits

# Progress and tables to the terminal, the rest to a file.
run_bench() {
  local name=$1
  shift
  warmed
  timeout -s INT -k 10 "$(left 530)" python3 "$@" 2>"$logs/$name.err" | tee "$logs/$name.log"
  local status=${PIPESTATUS[0]}
  if ((status)); then
    failed "$name"
    tail -25 "$logs/$name.err" | cut -c1-400
  fi
  say "$name ended with $status"
  pack
}
if wanted accuracy; then
  cat "$SITE"/trained/model.gguf.* >"$work/model.gguf"
  # shellcheck disable=SC2086
  run_bench accuracy benchmark/eval_accuracy.py "$logs/accuracy.json" --gguf "$work/model.gguf" \
    ${ACCURACY_ARGS:---at-once 4}
fi
if wanted bench; then
  for mixing in ${MIXING:-0}; do
    # shellcheck disable=SC2086
    NCCL_GRAPH_MIXING_SUPPORT=$mixing run_bench "bench$mixing" benchmark/bench_exchange.py \
      "$logs/exchange-mixing$mixing.csv" ${BENCH_ARGS:-}
  done
fi
# shellcheck disable=SC2086
{
  decode=benchmark/bench_decode.py
  wanted decode && run_bench decode $decode "$logs/decode.csv" ${DECODE_ARGS:-}
  wanted fill && run_bench fill $decode "$logs/fill.csv" --check-fill ${DECODE_ARGS:-}
  wanted off && run_bench off $decode "$logs/off.csv" --check-off ${DECODE_ARGS:-}
  wanted prefill && run_bench prefill benchmark/bench_prefill.py "$logs/prefill.csv" ${PREFILL_ARGS:-}
  wanted serving && run_bench serving benchmark/bench_serving.py "$logs/serving.jsonl" $SERVING_ARGS
  wanted bench-speculation && run_bench bench-speculation benchmark/bench_speculation.py \
    "$logs/speculation.csv" ${SPECULATION_ARGS:-}
}
if wanted caches; then
  # Without TorchInductor's, a first group of DeepSeek-V2 servers captured for 44 to 75 s.
  mapfile -t caches < <(cd "$HOME" &&
    ls -d .triton/cache .cache/{tvm-ffi,flashinfer,sglang/jit,torchinductor} 2>/dev/null)
  tar -C "$HOME" -cJf "$OUT/caches.tar.xz" --exclude='*.o' "${caches[@]}" || failed caches
  say "caches: $(du -h "$OUT/caches.tar.xz" | cut -f1)"
fi
say end
if [[ -e $work/failed ]]; then
  say "failed: $(tr '\n' ' ' <"$work/failed")"
  exit 1
fi
