#!/usr/bin/env bash
# One run under Open MPI, one process a GPU.
#
#   launch/mpirun.sh -n 16 -H host1:8,host2:8 -- --config=... --workdir=...
#
# Options before `--` are mpirun's, those after it the run's. JAX finds Open MPI 4 by itself. From
# Open MPI 5 on it does not: set JAX_COORDINATOR_ADDRESS=HOST:PORT, HOST the first of the hosts.
# To stop and save, send SIGTERM to one of the processes, not to mpirun, which kills all within a second.
set -eu
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
if [ $# -eq 0 ]; then
  echo "usage: launch/mpirun.sh MPIRUN_OPTIONS -- --config=FILE --workdir=DIR" >&2
  exit 2
fi
shift
source "$(dirname "$0")/xla_flags.sh"
for name in XLA_FLAGS CUDA_DEVICE_MAX_CONNECTIONS XLA_PYTHON_CLIENT_MEM_FRACTION \
            JAX_COORDINATOR_ADDRESS ESM1NV_DEVICES; do
  if [ -n "${!name:-}" ]; then options+=(-x "$name"); fi
done
exec mpirun "${options[@]}" "${PYTHON:-python}" -m esm1nv_jax.main "$@"
