# The one home of XLA, NCCL and allocator settings; sourced by every launcher. Last looked at
# 2026-11, jax 0.10. An unknown flag kills the process at its start, so tests/cluster/launch_test.py
# starts JAX with what is set here. Whatever the caller has set already stays.

# Overlap the gradient's all-reduce with the backward pass; XLA knows the flag in every build.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
# One hardware queue, so that collectives start in the order in which they were scheduled.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
