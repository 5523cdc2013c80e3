#!/usr/bin/env bash
# The whole recipe on real proteins, on a CPU: prepare, train, average, evaluate, probe.
#
#   benchmarks/whole_recipe.sh CORPUS DOWNSTREAM OUT [STEPS]
#
# CORPUS holds sp201401_nr50-0[0-8].fasta.gz: cluster representatives at 50 % identity, of which
# shard 08 is kept for the test. DOWNSTREAM holds the tables of secondary structure and
# localisation; heads see 2,000 proteins of each. A model of about a million parameters sees 8,192
# tokens a step. Killed, it goes on where it was.
set -euo pipefail
corpus=$1 downstream=$2 out=$3 steps=${4:-3600}
test=$corpus/sp201401_nr50-08.fasta.gz
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"

[ -f "$out/data/manifest.json" ] || esm1nv prepare --fasta "$corpus"/sp201401_nr50-0[0-7].fasta.gz \
  --out "$out/data" --validation 1000 --test 1000

time esm1nv train \
  --config="$here/configs/pretrain_small.py:width=128,layers=5,max_length=510,batch=16,steps=$steps" \
  --workdir="$out/run" --config.data.path="$out/data" --config.data.crop=random \
  --config.model.dropout=0.0 --config.model.attention_dropout=0.0 \
  --config.optimizer.peak_lr=2e-3 --config.optimizer.min_lr=1e-4 --config.optimizer.warmup=300 \
  --config.optimizer.constant=$((steps / 20)) --config.optimizer.horizon="$steps" \
  --config.evaluation.every=$((steps / 30)) --config.evaluation.sequences=0 \
  --config.checkpoint.every=$((steps / 300))

[ -d "$out/model" ] || time esm1nv average --workdir "$out/run" --last 47 --out "$out/model" \
  --report "$out/average.html" --data "$out/data:test" --proteins 300

groups=()
if command -v mmseqs >/dev/null; then
  [ -f "$out/identity.tsv" ] || python "$here/benchmarks/identity.py" \
    --train "$corpus"/sp201401_nr50-0[0-7].fasta.gz --test "$test" --out "$out/identity.tsv"
  groups=(--groups "$out/identity.tsv")
fi
time esm1nv evaluate --checkpoint "$out/model" --fasta "$test" "${groups[@]}" \
  --json "$out/evaluation.json" --report "$out/evaluation.html"

time esm1nv probe --checkpoint "$out/model" --task secondary_structure --limit 2000 \
  --csv "$downstream/flip_secondary_structure_3state.csv.gz" --json "$out/secondary_structure.json"
time esm1nv probe --checkpoint "$out/model" --task localisation --limit 2000 \
  --csv "$downstream/deeploc2_single_label_le510.csv.gz" --json "$out/localisation.json"
