#!/usr/bin/env bash
# Lanes of GPU tests that go on between calls, where a call's processes end with it unless they have
# a session of their own. Lanes run side by side, and the groups of a lane one after the other.
#
#   gpu_lanes.sh start FILE...    starts a lane for each file
#   gpu_lanes.sh wait SECONDS     waits, or until all lanes have ended. It prints what ended and how
#                                 far each case is from plain tp 1, and packs all logs into $OUT.
#   gpu_lanes.sh stop             ends all lanes with what they started
#
# A line of a lane's file is one group, in words: its name, how many servers run at once, a file of
# test/srt/gpu without `test_` and `.py`, model kinds separated by commas or `-`, and words for
# pytest -k. A line whose first word is `!` is a name and a command of the shell:
#
#   mla 5 server_gpu_mla mla-v3-d512,mla-glm-d512 tp2dcp2 and replicated
#   ! soak python3 -m fuzz --device cuda --soak 20 --setting llama-fa3-symm_a2a-page16-mixed
#
# 16 servers at once kept 32 cores and 2 GPUs busy. SITE, RELEASE and SGLANG_DCP_TEST_RANKS_PER_GPU are
# as in run_gpu.sh, which unpacks SGLang before. LANES is the folder of logs (/tmp/gpu-lanes).
set -uo pipefail
from=$PWD
cd "$(dirname "$0")/.."
LANES=${LANES:-/tmp/gpu-lanes}
mkdir -p "$LANES/logs" "$LANES/tests"

say() { echo "[$(($(date +%s) - $(cat "$LANES/began"))) s] $*" >>"$LANES/progress.log"; }

run() { # name, command
  local name=$1
  shift
  say "$name begins"
  "$@" >"$LANES/logs/$name.log" 2>&1
  local status=$?
  say "$name ended with $status: $(tail -n 1 "$LANES/logs/$name.log" | cut -c1-150)"
}

run_group() { # name, servers at once, file, kinds, words
  local name=$1 servers=$2 file=$3 kinds=$4
  shift 4
  [[ $kinds == - ]] && kinds=
  run "$name" env ${kinds:+SGLANG_DCP_TEST_KIND="$kinds"} SGLANG_DCP_TEST_SERVERS="$servers" \
    python3 -m pytest -s -v -p no:cacheprovider --basetemp="$LANES/tests/$name" -k "$*" \
    "test/srt/gpu/test_$file.py"
}

run_lane() { # its file, which may change while it runs
  local -a lines words
  mapfile -t lines <"$1"
  local line
  for line in "${lines[@]}"; do
    read -ra words <<<"$line"
    case ${words[0]:-#} in
      '#'*) ;;
      '!') run "${words[1]}" bash -c "${words[*]:2}" ;;
      *) run_group "${words[@]}" ;;
    esac
  done
}

# The sessions that `start` made, each named by its first process.
running() {
  local lane
  for lane in $(cat "$LANES/sessions" 2>/dev/null); do
    if [[ -n $(pgrep -s "$lane") ]]; then echo "$lane"; fi
  done
}

show() {
  cat "$LANES/progress.log"
  grep -hE "ratio [0-9]|^FAILED|^ERROR" "$LANES"/logs/*.log | cut -c1-250
  local log
  for log in "$LANES"/logs/*.log; do
    echo "$(basename "$log"): $(grep -c PASSED "$log") passed, $(grep -c '^FAILED' "$log") failed"
  done
}

pack() {
  tar -C "$LANES" -czf "$OUT/logs.tgz" logs progress.log
  (cd "$LANES" && find tests -name 'server*.log' |
    tar -czf "$OUT/servers.tgz" --ignore-failed-read --warning=no-file-changed -T -)
}

case ${1:-} in
  start)
    : "${SITE:?}"
    [[ -e $LANES/began ]] || date +%s >"$LANES/began"
    for file in "${@:2}"; do
      # Not this shell's job: it outlives the call.
      # A shell's background jobs ignore INT, and so would what they start.
      setsid env --default-signal=INT benchmark/gpu_lanes.sh lane "$(cd "$from" && realpath "$file")" >/dev/null 2>&1 </dev/null &
      lane=$!
      echo "$lane" >>"$LANES/sessions"
      # The end of the call would end it until it has a session of its own.
      while kill -0 "$lane" 2>/dev/null && [[ -z $(pgrep -s "$lane") ]]; do sleep 0.1; done
    done
    ;;
  lane)
    : "${SITE:?}"
    # shellcheck source=benchmark/gpu_environment.sh
    source benchmark/gpu_environment.sh
    run_lane "$2"
    ;;
  wait)
    OUT=$(cd "$from" && mkdir -p "${OUT:?}" && cd "$OUT" && pwd)
    end=$((SECONDS + $2))
    while ((SECONDS < end)) && [[ -n $(running) ]]; do sleep 2; done
    show
    pack
    ;;
  stop)
    # First the lanes' shells, or they go on with their next groups.
    for lane in $(running); do
      kill -KILL "$lane"
      pkill -INT -s "$lane"
    done
    sleep 8
    for lane in $(running); do pkill -KILL -s "$lane"; done
    rm -f "$LANES/sessions"
    ;;
  *)
    sed -n '2,/^set/p' benchmark/gpu_lanes.sh | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
esac
