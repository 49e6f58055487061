# Sourced: compiler flags that let communication run behind computation, each with its reason. A compiler ends at once at
# a flag that it does not know; tests/test_launch.py gives these to the installed ones.
# shellcheck shell=bash disable=SC2034 # the sourcing scripts use them

# TPUs, in LIBTPU_INIT_ARGS.
TPU_XLA_FLAGS=(
    # Gathers of FSDP's parameters and of the embeddings start early and end late, with work in between.
    --xla_enable_async_all_gather=true
    # The same for the sums of gradients.
    --xla_enable_async_all_reduce=true
    # The scheduler may put computation on the core between the start and the end of a collective.
    --xla_tpu_overlap_compute_collective_tc=true
)

# v5e alone: the compiler refuses these on v3, v4, v5p and v6e ("not supported/recommended").
TPU_V5E_XLA_FLAGS=(
    # A gather becomes one kernel with the matmuls next to it, which send while they compute; ...
    --xla_tpu_enable_async_collective_fusion=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    # ... and with several of them, for gathers longer than one matmul.
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true
)

# Between slices, whose network is an order of magnitude slower than the links in a slice.
TPU_MULTISLICE_XLA_FLAGS=(
    # The data-parallel sum of gradients between slices runs behind the backward pass, ...
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    # ... also where the gradients are of different sizes, as these are.
    --xla_tpu_data_parallel_opt_different_sized_ops=true
)

# NVIDIA GPUs, in XLA_FLAGS.
GPU_XLA_FLAGS=(
    # Orders the program such that collectives overlap with computation; this is off by default.
    --xla_gpu_enable_latency_hiding_scheduler=true
)
