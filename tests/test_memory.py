"""Remat and microbatches chosen by compiling: little recompute and few parts that leave a tenth of the memory free."""

import dataclasses
import types

import helpers
import jax
import numpy as np
import pytest

from flip_jax import config_check, host_memory, memory, sharding, too_large, train_step
from flip_jax.config import FinetuneConfig, MeshConfig
from flip_jax.config_check import REMAT
from flip_jax.runtime import UserError

MIB = 2**20
# MiB that the stand-in of the compiler says: what does not shrink with microbatches, and what does.
CONSTANT, SHARED = 1000, {"none": 64_000, "dots": 8000, "names": 4000, "full": 2000}
CONFIG = dataclasses.replace(helpers.CONFIG, global_batch_size=1024, total_samples=2048)


def mesh():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def choose(policy, limit=None, microbatches=1, recorded=None, **changes):
    config = memory.resolved(dataclasses.replace(CONFIG, **changes), policy, microbatches)
    with jax.set_mesh(mesh()):
        config, program, needed = memory.choose(config, mesh(), limit and int(limit * MIB), recorded)
    return config.model.remat, config.microbatches, needed / MIB


@pytest.fixture
def compiler(monkeypatch):
    """Compiles nothing: says what each choice needs, refuses those above `refused`, and counts the programs."""
    tried, real = [], train_step.make_program
    state = types.SimpleNamespace(tried=tried, refused=10_000)

    def lower(program, config, mesh):
        policy, count = config.model.remat, config.microbatches

        def compile():
            tried.append((policy, count))
            needed = CONSTANT + SHARED[policy] / count
            if needed > state.refused:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large\nby far")
            sizes = {"argument": needed * MIB, "temp": 0, "generated_code": 0, "output": 7, "alias": 7}
            stats = types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
            return types.SimpleNamespace(memory_analysis=lambda: stats)

        return types.SimpleNamespace(compile=compile)

    program = real(memory.resolved(CONFIG, "none", 1), mesh())
    monkeypatch.setattr(memory, "lower", lower)
    monkeypatch.setattr(train_step, "make_program", lambda config, mesh, first=0: program)
    monkeypatch.setattr(memory, "host_bytes", lambda *_: 0)
    return state


@pytest.mark.parametrize("limit, chosen", [(10_001, "dots"), (9999, "names"), (5556, "names"), (5555, "full")])
def test_the_first_policy_that_fits_with_a_tenth_to_spare(compiler, limit, chosen):
    assert choose("auto", limit) == (chosen, 1, CONSTANT + SHARED[chosen])
    assert choose("auto", limit, "auto") == (chosen, 1, CONSTANT + SHARED[chosen])


@pytest.mark.parametrize("limit, count", [(3300, 64), (2300, 64), (2000, 128), (1200, 1024)])
def test_the_least_number_of_microbatches_by_few_programs(compiler, limit, count):
    compiler.refused = float("inf")
    least = next(n for n in (2**i for i in range(11)) if CONSTANT + SHARED["none"] / n <= 0.9 * limit)
    assert least == count
    remat, found, needed = choose("auto", limit, "auto")
    assert (remat, found) == ("none", least) and needed <= 0.9 * limit
    assert len(compiler.tried) <= len(REMAT) + 3


def test_nothing_fits(compiler):
    with pytest.raises(UserError, match=r"(?s)global_batch_size 1024 does not fit .*lower it to \d+.*remat full"):
        choose("auto", 1000, "auto")
    with pytest.raises(UserError, match=r"(?s)set config.microbatches to auto.*full, 1 microbatch.*2.93 GiB"):
        choose("full", 2999)
    assert choose("full", 3000)[0] == "full"  # what was set by name may use all of the memory
    with pytest.raises(UserError, match=r"(?s)set config.model.remat to auto.*refused by the compiler"):
        choose("none", 100_000)


def test_a_resumed_run_keeps_the_recorded_choice_while_it_fits(compiler):
    recorded = memory.resolved(CONFIG, "full", 4)
    assert choose("auto", 20_000, "auto", recorded)[:2] == ("full", 4)
    assert choose("auto", 20_000, 2, recorded)[:2] == ("full", 2)
    assert choose("auto", 1400, "auto", recorded)[:2] != ("full", 4)


def test_fine_tuning_is_not_split():
    config = dataclasses.replace(CONFIG, microbatches="auto", finetune=FinetuneConfig(classes=3))
    assert memory.part_counts(config, mesh()) == [1]
    assert memory.part_counts(dataclasses.replace(CONFIG, microbatches="auto", global_batch_size=12), mesh()) == [
        *(1, 2, 3, 4, 6, 12)
    ]


def test_a_cpu_that_cannot_hold_the_batch_is_refused_before_compiling():
    config = memory.resolved(dataclasses.replace(CONFIG, global_batch_size=2**20), "auto", "auto")
    images = 2**20 * 32 * 32 * 3
    with jax.set_mesh(mesh()):
        with pytest.raises(UserError, match=r"state and batch alone need .* lower it to (\d+)") as refused:
            too_large.check(config, mesh(), 3 * images)
        batch = int(str(refused.value).partition("lower it to ")[2])
        too_large.check(dataclasses.replace(config, global_batch_size=batch), mesh(), 3 * images)
        with pytest.raises(UserError, match="raise config.mesh.fsdp"):
            too_large.check(config, mesh(), 1000)


@pytest.mark.parametrize(
    "version, limit, used, expected",
    [
        (2, "3000", "1200", 1900),  # 100 bytes of files are given back
        (2, "max", "1200", 8 * 1024),
        (1, "3000", "1200", 1900),
        (1, "9223372036854771712", "1200", 8 * 1024),
        (2, "100000", "1200", 8 * 1024),
    ],
)
def test_available_memory_is_the_least_that_linux_says(tmp_path, version, limit, used, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  16 kB\nMemFree:  1 kB\nMemAvailable:          8 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n" if version == 2 else "4:memory:/a/b\n1:cpu:/\n0::/\n")
    top = tmp_path / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (top / "a/b").mkdir(parents=True)
    for name, value in zip(names, (limit, used), strict=True):
        (top / "a" / name).write_text(value + "\n")  # the limit of the group above holds, too
    (top / "a/memory.stat").write_text("active_file 500\ninactive_file 100\n")
    assert host_memory.available(tmp_path) == expected
    assert host_memory.available(tmp_path / "nowhere") is None


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    machine = memory.zlib.crc32(memory.socket.gethostname().encode()) >> 1

    def gather(own):  # two processes here, one on another machine with less memory
        assert own.dtype == np.int32 and own.tolist() == [24 * 1024, machine, jax.local_device_count()]
        return np.stack([own, own, np.array([5 * 1024, machine + 1, 4], np.int32)])

    monkeypatch.setattr(host_memory, "available", lambda: 24 * 2**30 + 5)
    monkeypatch.setattr(memory.multihost_utils, "process_allgather", gather)
    assert memory.device_memory() == min(24 * 1024 // (2 * jax.local_device_count()), 5 * 1024 // 4) * MIB


def test_numbers_and_auto_are_both_given_on_the_command_line():
    for text, value in (("8", 8), ("auto", "auto")):
        given = config_check.read_recipe(["--config=configs/flip_l16.py", f"--config.microbatches={text}"])
        assert given.microbatches == value
    assert config_check.read_recipe(["--config=configs/flip_l16.py:microbatches=4"]).microbatches == 4
    for text in ("0", "some"):
        with pytest.raises(UserError, match="config.microbatches must be"):
            config_check.read_recipe(["--config=configs/flip_l16.py", f"--config.microbatches={text}"])


@pytest.mark.slow
def test_what_is_compiled_keeps_less_from_policy_to_policy_and_runs():
    small = {"global_batch_size": 16}
    peaks = [choose(policy, **small)[2] for policy in REMAT]
    assert peaks == sorted(set(peaks), reverse=True)
