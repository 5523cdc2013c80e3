#!/usr/bin/env bash
# Runs the commands behind the CPU figures of README.md and docs/, one after another, into a folder.
#
#   benchmarks/all.sh CORPUS DOWNSTREAM OUT [NAME ...]
#
# CORPUS and DOWNSTREAM as for benchmarks/whole_recipe.sh. The output of NAME is OUT/NAME.log, its
# figures, if it writes any, OUT/NAME.json; OUT/machine.txt has the CPU, the versions and the date. A
# command that fails is reported and the next one starts; started again, the script skips those that
# are done (OUT/NAME.done). With NAMEs it runs only those. Needs the extras `bench` and `test`, and
# hours on two cores, on which nothing else should run. Exit status: 0 all done, 1 some failed, 2 a
# mistake, 130 stopped by Ctrl-C.
set -u
if [ $# -lt 3 ] || [ ! -d "$1" ] || [ ! -d "$2" ]; then
  echo "usage: benchmarks/all.sh CORPUS DOWNSTREAM OUT [NAME ...], the first two folders" >&2
  exit 2
fi
mkdir -p "$3" || exit 2
corpus=$(realpath "$1") downstream=$(realpath "$2") out=$(realpath "$3")
shift 3
cd "$(dirname "$0")/.." || exit 2
names=$(sed -n 's/^\(run\|speed\) \([a-z_]*\) .*/\2/p' benchmarks/all.sh)
for name in "$@"; do
  if ! grep -qx -- "$name" <<<"$names"; then
    echo "error: there is no $name; there are" $names >&2
    exit 2
  fi
done
wanted=" $* " failed=""
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
test=$corpus/sp201401_nr50-08.fasta.gz
training=("$corpus"/sp201401_nr50-0[0-7].fasta.gz)
# With these PyTorch, too, keeps the memory that it has freed.
keep=(env MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 MALLOC_TOP_PAD_=67108864 MALLOC_ARENA_MAX=1)

{
  date
  grep -m1 'model name' /proc/cpuinfo
  echo "$(nproc) cores"
  git log -1 --format='commit %h' 2>/dev/null
  python -m pip list 2>/dev/null | grep -E '^(jax|jaxlib|flax|torch|transformers|peft|numpy) '
} >>"$out/machine.txt"

run() { # NAME COMMAND...
  local name=$1 status=0
  shift
  case $wanted in '  ' | *" $name "*) ;; *) return ;; esac
  if [ -f "$out/$name.done" ]; then
    echo "$name: done before"
    return
  fi
  echo "$name: $*"
  "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) touch "$out/$name.done" ;;
    130) exit 130 ;;
    *)
      echo "$name: failed with status $status, see $out/$name.log" >&2
      failed+=" $name"
      ;;
  esac
}

speed() { # NAME COMMAND...: a command that writes its figures with --json
  run "$@" --json "$out/$1.json"
}

ablations() {
  local data=$out/ablations/data runs=$out/ablations/runs
  [ -f "$data/manifest.json" ] \
    || esm1nv prepare --fasta "${training[@]}" --out "$data" --validation 1000 --test 1000 || return
  JOBS=2 EVALUATE="--data $data:test --masking card" \
    launch/sweep.sh configs/ablations/sweep.txt "$runs" "--config.data.path=$data" || return
  esm1nv compare "$runs" --out "$runs/index.html" || return
  benchmarks/averaging_spacings.sh "$runs" "$data" "$out/ablations/averages"
}

input() {
  [ -f "$out/input/manifest.json" ] || esm1nv prepare --out "$out/input" \
    --fasta "$corpus"/sp201401_nr50-0[0-4].fasta.gz --validation 1000 --test 1000 || return
  python benchmarks/input.py "$out/input" --workers 2 --json "$out/input.json"
}

finetuning() { # of the small model of train.py, after one step
  [ -d "$out/small/checkpoints/1" ] || esm1nv train --workdir="$out/small" \
    --config=configs/pretrain_small.py:hf,width=256,layers=5,max_length=510,batch=2,steps=1 \
    --config.data.path=sample --config.evaluation.sequences=20 || return
  python benchmarks/finetuning.py --model "$out/small" --task residue_classification \
    --csv "$downstream/flip_secondary_structure_3state.csv.gz" --dtype bfloat16 --rounds 2 --steps 4 \
    --json "$out/finetuning.json"
}

# README.md
run quickstart python -m esm1nv_jax.main --config=configs/quickstart.py --workdir="$out/quickstart-run"
run tests env XDG_CACHE_HOME="$out/cache" python -m pytest
# docs/performance.md. The full size: at most two programs at a time fit into 24 GiB.
speed startup python benchmarks/startup.py
speed loop python benchmarks/loop.py
speed plan python benchmarks/plan.py
run process_memory python -m pytest -q -n 0 -m slow tests/planning/process_memory_test.py
full=(python benchmarks/train.py --fasta "$test" --steps 3 --rounds 5 --dtypes bfloat16)
speed train_full_a "${full[@]}" --rival a
speed train_full_b "${full[@]}" --rival b
speed train_full_a_kept "${keep[@]}" "${full[@]}" --rival a
speed train_full_b_kept "${keep[@]}" "${full[@]}" --rival b
small=(python benchmarks/train.py --fasta "$test" --model small --steps 5 --rounds 3)
speed train_small "${small[@]}" --dtypes bfloat16
speed train_small_kept "${keep[@]}" "${small[@]}"
run accuracy python benchmarks/train.py --fasta "$test" --model small --rows 2 --accuracy 200
run residual python benchmarks/residual.py
speed embed python benchmarks/embed.py --fasta "$test" --residues 30000 --rounds 2 --rivals
# docs/data.md
speed prepare python benchmarks/prepare.py --fasta "${training[@]}" --copies 4 --rounds 3
run input input
# docs/finetuning.md
run finetuning finetuning
# docs/clusters.md
speed saving python benchmarks/saving.py --rounds 2 --folder "$out/saving-run"
run soak python tests/soak.py --kills 30 --processes 2
# docs/results.md
speed averaging python benchmarks/averaging.py --members 47 --folder "$out/averaging-run"
run whole_recipe benchmarks/whole_recipe.sh "$corpus" "$downstream" "$out/recipe"
# docs/ablations.md
run ablations ablations
# docs/performance.md again, the longest last
perplexity=(python benchmarks/time_to_perplexity.py --fasta "${training[@]}" --grid 3e-4)
quick=(--recipe quickstart --our-grid 2e-3)
run perplexity_quickstart "${perplexity[@]}" "${quick[@]}" --minutes 4 --seeds 3 --share 0.5 \
  --out "$out/perplexity-quickstart"
run perplexity_short "${perplexity[@]}" --minutes 4 --seeds 3 --out "$out/perplexity-short"
run perplexity "${perplexity[@]}" --seeds 2 --out "$out/perplexity-long"

[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
