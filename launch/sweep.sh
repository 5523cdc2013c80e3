#!/usr/bin/env bash
# A list of configs, each with several seeds, into one folder; goes on where it stopped.
#
#   launch/sweep.sh LIST OUT [--config.FIELD=VALUE ...]
#   JOBS=4 EVALUATE="--fasta test.fasta --masking card" \
#     launch/sweep.sh configs/ablations/sweep.txt runs/ablations --config.data.path=DIR
#
# LIST: configs/ablations/sweep.txt, which says how one is written. Options are for every run, and
# come last. Runs go one after another, or JOBS at a time; run NAME of seed S is OUT/NAME-S, its
# output OUT/NAME-S.log. EVALUATE are options of `esm1nv evaluate`, which then evaluates every run
# at its end in the same way. ITEM=N is run N alone, counted from 0; ITEM=count prints how many
# there are.
# Exit status: 0 all done, 2 a mistake, 75 or 130 stopped (start it again), else a run failed.
set -uf
if [ $# -lt 2 ] || [ ! -r "$1" ] || [ -d "$1" ] || [[ -z $2 || $2 == -* ]]; then
  echo "error: give a list that can be read, such as configs/ablations/sweep.txt, and a folder" >&2
  exit 2
fi
list=$1 out=$2 python=${PYTHON:-python}
shift 2

seeds="" shared_arguments="" shared_options="" names=() runs=()
while read -r name config options || [ -n "$name" ]; do
  case $name in
    ''|'#'*) ;;
    seeds)
      seeds="$config $options"
      [[ $seeds =~ ^[0-9[:blank:]]+$ ]] ||
        { echo "error: $list: seeds ${seeds@Q} are no numbers; write \`seeds 0 1 2\`" >&2; exit 2; } ;;
    all)
      shared_arguments=$config shared_options=$options
      [[ $config != --* ]] || shared_arguments="" shared_options="$config $options" ;;
    *[!A-Za-z0-9_]*) echo "error: $list: name $name has more than letters, digits and _" >&2; exit 2 ;;
    *)
      [ -n "$config" ] || { echo "error: $list: $name has no config" >&2; exit 2; }
      [ -n "${seeds// }" ] ||
        { echo "error: $list: $name has no seeds; write \`seeds 0 1 2\` above it" >&2; exit 2; }
      for seed in $seeds; do
        own=""; [[ $config != *:* ]] || own=,${config#*:} # of two equal arguments the later one wins
        names+=("$name-$seed")
        runs+=("--config=${config%%:*}:$shared_arguments$own,seed=$seed $shared_options $options")
      done ;;
  esac
done <"$list"
if [ ${#names[@]} -eq 0 ]; then
  echo "error: $list has no runs; write \`seeds 0 1 2\`, \`all ARGUMENTS OPTIONS\`, then \`NAME CONFIG\`" >&2
  exit 2
fi
if [ -n "$(printf '%s\n' "${names[@]}" | sort | uniq -d)" ]; then
  echo "error: $list has a name twice: $(printf '%s\n' "${names[@]}" | sort | uniq -d | head -1)" >&2
  exit 2
fi
items=$(seq 0 $((${#names[@]} - 1)))
case ${ITEM-all} in
  all) ;;
  count) echo ${#names[@]}; exit 0 ;;
  *[!0-9]*|'') echo "error: ITEM=$ITEM is no number, and not count" >&2; exit 2 ;;
  *) [ "$ITEM" -lt ${#names[@]} ] || { echo "error: ITEM=$ITEM of ${#names[@]} runs" >&2; exit 2; }
     items=$((10#$ITEM)) ;;
esac
jobs=${JOBS:-1}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "error: JOBS=$jobs is no number from 1" >&2; exit 2; }
# Several processes share a GPU only if the first does not take all of its memory.
[ "$jobs" -eq 1 ] || export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] ||
  { echo "error: $out cannot be made, or written to; give a folder of yours" >&2; exit 2; }

logged() { # Python with these arguments, which a SIGTERM reaches; its status
  "$python" "$@" >>"$log" 2>&1 &
  trap "stopped=75; kill -TERM $! 2>/dev/null" TERM
  while kill -0 $! 2>/dev/null; do wait $!; done # each signal ends a `wait`, before the run has saved
  wait $!
}
run() { # number of a run, options of every run; its status is that of training, or of evaluation
  local name=${names[$1]} options=${runs[$1]} status command
  shift
  local folder=$out/$name log=$out/$name.log
  command="$options $* ${EVALUATE-}"
  if [ -f "$folder/done" ] && [ "$(cat "$folder/done")" = "$command" ]; then return 0; fi
  rm -f "$folder/done" "$folder/evaluation.json" # of another command
  trap : INT # the script has it too, and hands on SIGTERM
  logged -m esm1nv_jax.main $options --workdir="$folder" "$@"; status=$?
  if [ $status -eq 0 ] && [ -n "${EVALUATE-}" ]; then
    [ -z "$stopped" ] || return "$stopped"
    logged -m esm1nv_jax evaluate --checkpoint "$folder" $EVALUATE \
      --json "$folder/evaluation.json"; status=$?
  fi
  [ $status -ne 0 ] || echo "$command" >"$folder/done"
  return $status
}

stopped="" failed=0 pids=() running=()
trap 'stopped=75; kill -TERM "${pids[@]}" 2>/dev/null' TERM
# Of a terminal the runs have it too, but what bash starts in the background begins with it ignored.
trap 'stopped=130; kill -TERM "${pids[@]}" 2>/dev/null' INT
collect() { # of runs that have ended: says how; one that was stopped stops all
  local k status
  for k in "${!pids[@]}"; do
    kill -0 "${pids[$k]}" 2>/dev/null && continue
    wait "${pids[$k]}"; status=$?
    echo "sweep.sh: ${running[$k]}: $([ $status -eq 0 ] && echo done || echo "status $status, see $out/${running[$k]}.log")"
    case $status in
      0) ;;
      75|130) stopped=${stopped:-$status} ;;
      *) failed=$status ;;
    esac
    unset "pids[$k]" "running[$k]"
  done
}
{ # read whole: bash reads a script as it goes, and this one may be edited meanwhile
for item in $items; do
  while [ ${#pids[@]} -ge "$jobs" ]; do sleep 0.2; collect; done
  [ -z "$stopped" ] || break
  run "$item" "$@" &
  pids[$item]=$! running[$item]=${names[$item]}
done
while [ ${#pids[@]} -gt 0 ]; do sleep 0.2; collect; done
[ -z "$stopped" ] || { echo "sweep.sh: stopped; the same command goes on" >&2; exit "$stopped"; }
[ "$failed" -ne 0 ] || [ "${ITEM-all}" != all ] || echo "sweep.sh: esm1nv compare $out --out $out/index.html"
exit "$failed"
}
