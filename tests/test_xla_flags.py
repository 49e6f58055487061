"""The compiler flags of launch/xla_flags.sh against the installed compilers, which exit at an unknown flag."""

import importlib.util
import os
import subprocess
import sys

import pytest
from launch_stand_in import flags


def test_the_gpu_flags_are_known_to_the_installed_compiler():
    assert accepts({"XLA_FLAGS": " ".join(flags("GPU_XLA_FLAGS"))}, "import jax; jax.numpy.zeros(1)") == (True, "")
    ok, error = accepts({"XLA_FLAGS": "--xla_gpu_no_such_flag=true"}, "import jax; jax.numpy.zeros(1)")
    assert not ok and "xla_gpu_no_such_flag" in error


@pytest.mark.parametrize("topology", ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_flags_are_known_to_the_installed_compiler(topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    program = f"""
import jax
from jax.experimental import topologies
device = topologies.get_topology_desc(platform="tpu", topology_name={topology!r}).devices[0]
place = jax.sharding.SingleDeviceSharding(device)
jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((128, 128), "float32", sharding=place)).compile()
"""
    env = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    ok, error = accepts(env | {"LIBTPU_INIT_ARGS": " ".join(flags("TPU_XLA_FLAGS"))}, program)
    assert ok, error


def accepts(env, program):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **env}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    return result.returncode == 0, result.stderr
