#!/usr/bin/env bash
# One run on a TPU slice of Google Cloud, one process a host. JAX finds the hosts by itself.
#
#   launch/tpu_pod.sh NAME ZONE --config=... --config.data.path=gs://... --workdir=gs://...
#
# The project lies in ~/esm1nv_jax on every host, installed with the extra [tpu].
set -eu
if [ $# -lt 3 ]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE --config=FILE --workdir=gs://BUCKET/DIR" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
command="cd ~/esm1nv_jax && ESM1NV_LAUNCHER=tpu_pod python3 -m esm1nv_jax.main$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
