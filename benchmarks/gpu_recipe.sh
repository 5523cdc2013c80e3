#!/usr/bin/env bash
# The best small model of one GPU in three minutes: clusters, prepare, train, evaluate.
#
#   . launch/xla_flags.sh && benchmarks/gpu_recipe.sh CORPUS OUT [STEPS]
#
# CORPUS as for benchmarks/clusters.py. 7.5 million parameters: 6 layers, 320 wide, rotary
# positions; Muon; one member of each cluster an epoch; 131,072 tokens a step. `hf` makes the model
# one that `transformers` computes, too.
set -euo pipefail
corpus=$1 out=$2 steps=${3:-3680}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"

[ -f "$out/clusters/groups.tsv" ] || python "$here/benchmarks/clusters.py" "$corpus" "$out/clusters"
[ -f "$out/data/manifest.json" ] || esm1nv prepare --fasta "$out/clusters/clusters.fasta.gz" \
  --groups "$out/clusters/groups.tsv" --out "$out/data" --validation 1000 --test 1000

esm1nv train \
  --config="$here/configs/pretrain_small.py:hf,width=320,layers=6,max_length=510,batch=256,steps=$steps" \
  --workdir="$out/run" --config.data.path="$out/data" --config.data.crop=random \
  --config.data.sample=one_per_group --config.data.workers=4 \
  --config.model.position_kind=rotary \
  --config.model.dropout=0.0 --config.model.attention_dropout=0.0 \
  --config.optimizer.kind=muon --config.optimizer.peak_lr=2e-3 --config.optimizer.min_lr=2e-5 \
  --config.optimizer.warmup=0.04 --config.optimizer.constant=0 --config.optimizer.horizon=1.0 \
  --config.optimizer.weight_decay=0.05 \
  --config.evaluation.every=1000 --config.evaluation.sequences=1000 \
  --config.checkpoint.every=2000 --config.checkpoint.keep=2 --config.log.every=20

esm1nv evaluate --checkpoint "$out/run" --fasta "$corpus/sp201401_nr50-08.fasta.gz" \
  --json "$out/evaluation.json"
