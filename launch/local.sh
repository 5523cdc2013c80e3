#!/usr/bin/env bash
# Several processes on this host, one a GPU (or a CPU device), as one run.
#
#   launch/local.sh [-n PROCESSES] [--restarts N] COMMAND...
#   launch/local.sh -n 8 --restarts 3 python -m esm1nv_jax.main --config=... --workdir=...
#
# Without -n: one process for each GPU that nvidia-smi lists. Names each process that dies. A run
# that lost one is started again up to N times and goes on from its newest checkpoint. Exit status:
# 0 done, 2 a mistake in the command, 75 saved after SIGTERM, 130 after Ctrl-C, else a fault.
set -u
processes="" restarts=0
while [ $# -gt 0 ]; do
  case "$1" in
    -n) processes="${2:-none}"; shift; shift ;;
    --restarts) restarts="${2:-none}"; shift; shift ;;
    -h|--help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "error: option $1 is unknown; there are -n and --restarts, then a command" >&2; exit 2 ;;
    *) break ;;
  esac
done
if ! [[ $restarts =~ ^[0-9]+$ ]]; then
  echo "error: --restarts $restarts is no number; give how often a run that fails is started again" >&2
  exit 2
fi
if [ -z "$processes" ]; then
  processes=$(nvidia-smi -L 2>/dev/null | wc -l)
fi
if [ $# -eq 0 ] || ! [ "$processes" -ge 1 ] 2>/dev/null; then
  echo "error: give -n PROCESSES (1 or more; no GPU was found to count) and a command" >&2
  exit 2
fi
source "$(dirname "$0")/xla_flags.sh"
GRACE=40 # seconds for the others to leave by themselves, once one has died

exec 3>&2
say() { echo "local.sh: $*" >&3; }
ended() { # status -> words
  if [ "$1" -gt 128 ]; then echo "was killed by SIG$(kill -l $(($1 - 128)))"; else echo "left with status $1"; fi
}

asked=""
trap 'asked=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

start() {
  local port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
  pids=() number=()
  for ((k = 0; k < processes; k++)); do
    JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$k" \
      JAX_LOCAL_DEVICE_IDS="$k" "$@" &
    pids+=($!)
    number[$!]=$k
  done
}

finish() { # waits for all; the status of the run is in $result
  # Each is asked for by name: bash's `wait -n` forgets, now and then, one that ended meanwhile.
  local deadline="" status i left=("${pids[@]}")
  result=0
  while [ ${#left[@]} -gt 0 ]; do
    sleep 0.2
    for i in "${!left[@]}"; do
      kill -0 "${left[$i]}" && continue
      wait "${left[$i]}"
      status=$?
      case "$status" in
        0|75|130) ;;
        *) say "process ${number[${left[$i]}]} (pid ${left[$i]}) $(ended "$status")" ;;
      esac
      unset "left[$i]"
      [ "$status" -eq 0 ] && continue
      if [ "$result" -eq 0 ] || [ "$result" -eq 75 ]; then result=$status; fi
      [ -z "$deadline" ] && deadline=$((SECONDS + GRACE))
    done
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ] && [ ${#left[@]} -gt 0 ]; then
      kill -KILL "${left[@]}"
    fi
  done
}

for ((attempt = 0; ; attempt++)); do
  start "$@"
  finish 2>/dev/null # bash's own words on those that ended or were killed
  case "$result" in 0|2|75|130) exit "$result" ;; esac
  if [ -n "$asked" ] || [ "$attempt" -ge "$restarts" ]; then exit "$result"; fi
  say "starting again ($((attempt + 1)) of $restarts)"
done
