#!/usr/bin/env bash
# The whole recipe on real proteins, on a CPU: clusters, prepare, train, evaluate, probe.
#
#   benchmarks/whole_recipe.sh CORPUS DOWNSTREAM OUT [STEPS]
#
# CORPUS as for benchmarks/clusters.py, whose shard 08 is kept for the test; DOWNSTREAM holds the
# table of secondary structure, of which a linear probe sees 2,000 proteins. Two million parameters,
# two hours of one CPU core: rotary positions and Muon (docs/ablations.md), one member of each cluster
# an epoch, 6,144 tokens a step, of which 30 % are predicted at first and 15 % at the end. Killed, it
# goes on where it was.
set -euo pipefail
corpus=$1 downstream=$2 out=$3 steps=${4:-2800}
test=$corpus/sp201401_nr50-08.fasta.gz
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"

[ -f "$out/clusters/groups.tsv" ] || python "$here/benchmarks/clusters.py" "$corpus" "$out/clusters"
[ -f "$out/data/manifest.json" ] || esm1nv prepare --fasta "$out/clusters/clusters.fasta.gz" \
  --groups "$out/clusters/groups.tsv" --out "$out/data" --validation 1000 --test 1000

time esm1nv train \
  --config="$here/configs/pretrain_small.py:width=192,layers=5,max_length=510,batch=12,steps=$steps" \
  --workdir="$out/run" --config.data.path="$out/data" --config.data.crop=random \
  --config.data.sample=one_per_group --config.compute.dtype=float32 \
  --config.model.position_kind=rotary \
  --config.masking.rate=0.30 --config.masking.final_rate=0.15 \
  --config.model.dropout=0.0 --config.model.attention_dropout=0.0 \
  --config.optimizer.kind=muon --config.optimizer.peak_lr=4e-3 --config.optimizer.min_lr=4e-5 \
  --config.optimizer.warmup=0.04 --config.optimizer.constant=0 --config.optimizer.horizon=1.0 \
  --config.optimizer.weight_decay=0.05 \
  --config.evaluation.every=250 --config.evaluation.sequences=300 \
  --config.checkpoint.every=250 --config.checkpoint.keep=2

groups=()
if command -v mmseqs >/dev/null; then
  [ -f "$out/identity.tsv" ] || python "$here/benchmarks/identity.py" \
    --train "$out/clusters/clusters.fasta.gz" --test "$test" --out "$out/identity.tsv"
  groups=(--groups "$out/identity.tsv")
fi
time esm1nv evaluate --checkpoint "$out/run" --fasta "$test" "${groups[@]}" \
  --json "$out/evaluation.json" --report "$out/evaluation.html"

time python "$here/benchmarks/finetuning_evidence.py" --model "$out/run" --data "$downstream" \
  --out "$out/downstream" --tasks secondary_structure --methods probe --train 2000 --longest 510
