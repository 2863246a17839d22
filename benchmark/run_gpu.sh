#!/usr/bin/env bash
# On a bare GPU machine without network: unpack SGLang, run the GPU tests, measure; the
# short table comes last. Variables:
#   STACK  archive of SGLang and what it needs beside torch; unpacked into SITE
#   CACHE  archive of compiled kernels, unpacked into $HOME; they name SITE by its path
#   FA3    archive of FlashAttention-3, unpacked into SITE
#   OUT    where logs and results go
#   PARTS  which of: kernels exchange symm adaptors latents server bf16 mla dtypes fused limits bench
#          decode fill off serving; limits compares what fits into free memory, so by itself
#   ARGS   options of the last four, as "--contexts 32768 --profile 32768 8"
#   MIXING which values of NCCL_GRAPH_MIXING_SUPPORT to measure with
set -uo pipefail
cd "$(dirname "$0")/.."
: "${STACK:?}" "${SITE:?}" "${OUT:?}"
PARTS=${PARTS:-kernels exchange adaptors server bench}
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH=$SITE:$PWD/python PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
began=$SECONDS

say() { echo "[$((SECONDS - began)) s] $*"; }
wanted() { [[ " $PARTS " == *" $1 "* ]]; }

if [[ ! -d $SITE ]]; then
  mkdir -p "$SITE"
  tar -C "$SITE" -xf "$STACK"
  if [[ -n ${CACHE:-} ]]; then tar -C "$HOME" -xf "$CACHE"; fi
  if [[ -n ${FA3:-} ]]; then tar -C "$SITE" -xf "$FA3"; fi
  say unpacked
  # Many processes import SGLang at once: compile it once before.
  python3 -m compileall -q -j 0 "$SITE" >/dev/null 2>&1
  say compiled
fi

run_tests() {
  local name=$1 limit=$2
  shift 2
  timeout "$limit" python3 -m pytest -q -p no:cacheprovider --durations=3 \
    --basetemp="/tmp/gpu-tests-$name" "$@" >"$OUT/$name.log" 2>&1
  say "$name ended with $?"
}

# None of these is timed, so they may share the machine.
tests=test/srt/test_
wanted kernels && run_tests kernels 200 -n 10 \
  ${tests}merge_gpu.py ${tests}merge_peers_gpu.py ${tests}local_view_gpu.py &
wanted exchange && run_tests exchange 240 ${tests}exchange_gpu.py &
wanted symm && run_tests symm 550 ${tests}symm_a2a_gpu.py ${tests}symm_a2a_ranks_gpu.py &
wanted adaptors && run_tests adaptors 300 ${tests}adaptors_gpu.py &
wanted latents && run_tests latents 500 -n 6 ${tests}adaptors_mla_gpu.py &
wanted server && run_tests server 270 -s ${tests}server_gpu.py &
wanted bf16 && run_tests bf16 500 -s ${tests}server_gpu_bf16.py &
wanted mla && run_tests mla 550 -s ${tests}server_gpu_mla.py &
wanted dtypes && run_tests dtypes 200 -s ${tests}server_gpu_dtypes.py &
wanted fused && run_tests fused 200 -s ${tests}server_gpu_fused_write.py &
wanted limits && run_tests limits 550 -s ${tests}server_gpu_limits.py &
wait
tar -C /tmp --ignore-failed-read -czf "$OUT/server-logs.tgz" \
  gpu-tests-server/fleet0 --exclude=*.safetensors 2>/dev/null

if wanted bench; then
  for mixing in ${MIXING:-1 0}; do
    NCCL_GRAPH_MIXING_SUPPORT=$mixing timeout 250 python3 benchmark/bench_exchange.py \
      "$OUT/exchange-mixing$mixing.csv" >"$OUT/bench$mixing.log" 2>&1
    say "bench with NCCL_GRAPH_MIXING_SUPPORT=$mixing ended with $?"
  done
fi
# Progress and tables to the terminal, SGLang's log to a file.
run_bench() {
  local name=$1
  shift
  # shellcheck disable=SC2086
  timeout 570 python3 "$@" ${ARGS:-} 2>"$OUT/$name.err"
  local status=$?
  if ((status)); then tail -25 "$OUT/$name.err" | cut -c1-400; fi
  say "$name ended with $status"
}
wanted decode && run_bench decode benchmark/bench_decode.py "$OUT/decode.csv"
wanted fill && run_bench fill benchmark/bench_decode.py "$OUT/fill.csv" --check-fill
wanted off && run_bench off benchmark/bench_decode.py "$OUT/off.csv" --check-off
wanted serving && run_bench serving benchmark/bench_serving.py "$OUT/serving.jsonl"

for part in kernels exchange symm adaptors latents server bf16 mla dtypes fused limits; do
  wanted "$part" || continue
  echo "== $part"
  grep -E "ratio|max \|d|^(FAILED|ERROR)|passed|failed|error" "$OUT/$part.log" | tail -12 | cut -c1-400
done
for log in "$OUT"/bench?.log; do
  [[ -e $log ]] || continue
  echo "== $log"
  tail -20 "$log" | cut -c1-400
done
say end
