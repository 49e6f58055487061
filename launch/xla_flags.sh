# Sourced: compiler flags that overlap communication with computation, each with its reason. A compiler exits at once on
# an unknown flag; tests/test_xla_flags.py checks these against the installed compilers.
# shellcheck shell=bash disable=SC2034 # the sourcing scripts use them

# TPUs, in LIBTPU_INIT_ARGS. Chosen by compiling flip_b16's train step at fsdp 8 with libtpu 0.0.51. Not set, because
# they are often recommended but changed nothing: xla_enable_async_all_reduce, xla_tpu_overlap_compute_collective_tc (on v4, v5e) and
# xla_tpu_enable_data_parallel_all_reduce_opt (two slices of v5e). xla_tpu_enable_async_collective_fusion_fuse_all_gather
# is refused on v3, v4, v5p and v6e ("not supported"), and changed nothing on v5e.
TPU_XLA_FLAGS=(
    # Gathers of FSDP's parameters overlap with computation. On v4 this makes all of them asynchronous, for 2 % more
    # temporary memory; on v5e it changed nothing.
    --xla_enable_async_all_gather=true
)

# NVIDIA GPUs, in XLA_FLAGS.
GPU_XLA_FLAGS=(
    # Orders the program so that collectives overlap with computation; XLA's default is off.
    --xla_gpu_enable_latency_hiding_scheduler=true
)
