#!/usr/bin/env bash
# Averages of eight checkpoints at several spacings, in the constant phase and at the end.
#
#   benchmarks/averaging_spacings.sh RUNS DATA OUT
#
# RUNS is the folder of configs/ablations/sweep.txt, whose runs `constant_at_peak` (at the peak rate
# from step 24 to 204) and `baseline` (decayed) keep a checkpoint every 5 steps. Writes
# OUT/RUN-STEP-SPACING/evaluation.json and prints a line each: run, last step, spacing, perplexity at
# `<mask>` of the last checkpoint and of the average, same masks. Goes on where it stopped.
set -euo pipefail
runs=$1 data=$2 out=$3
mkdir -p "$out"

evaluated() { # checkpoint, folder: perplexity at <mask>
  [ -f "$2/evaluation.json" ] || esm1nv evaluate --checkpoint "$1" --data "$data:test" --masking card \
    --json "$2/evaluation.json" >"$2/log" 2>&1
  python -c 'import json, sys; print("%.3f" % json.load(open(sys.argv[1]))["overall"]["perplexity_mask"])' \
    "$2/evaluation.json"
}

for seed in 0 1 2; do
  for end in constant_at_peak:200 baseline:300; do
    run=${end%:*}-$seed step=${end#*:}
    last=$out/$run-$step
    mkdir -p "$last"
    before=$(evaluated "$runs/$run/checkpoints/$step" "$last")
    for spacing in 5 10 20; do
      steps=$(seq -s, $((step - 7 * spacing)) "$spacing" "$step")
      average=$last-$spacing
      mkdir -p "$average"
      [ -d "$average/model" ] || esm1nv average --workdir "$runs/$run" --steps "$steps" \
        --out "$average/model" >/dev/null 2>&1
      echo "$run $step $spacing $before $(evaluated "$average/model" "$average")"
    done
  done
done
