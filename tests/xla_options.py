"""XLA's options for the tests, which must be set before JAX starts."""

import importlib.metadata

# Little is computed and much compiled: without costly passes and, where XLA can do without them, kernels through MLIR,
# a step compiles in a quarter of the time.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # 0.12 ends at this option
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
DEVICES = "--xla_force_host_platform_device_count="
