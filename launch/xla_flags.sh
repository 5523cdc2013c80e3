# What XLA, NCCL and CUDA are told on GPUs. Source it before a run: . launch/xla_flags.sh
# The only home of such settings. An unknown XLA flag kills the process: tests/planning/flags_test.py
# starts JAX with these. Accepted by jaxlib 0.10.2, November 2026; by 0.11.2 on an H200.

# Starts each reduction of gradients as soon as its bucket is ready, under the rest of the backward.
flags="--xla_gpu_enable_latency_hiding_scheduler=true"
# Gradients (176 MB in fp32) travel in buckets of up to 32 MiB: few, but none as late as the whole.
flags="$flags --xla_gpu_all_reduce_combine_threshold_bytes=33554432"
export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"  # of two settings the later one holds: the caller's
unset flags

# JAX takes 75 % of the memory otherwise; the rest is for CUDA, cuDNN and NCCL.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.90}"
# Kernels reach the GPU in the order in which XLA scheduled them, reductions included.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
