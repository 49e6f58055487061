"""Remat chosen by compiling: the least recompute that leaves a tenth of the memory free."""

import dataclasses
import types

import helpers
import jax
import pytest

from flip_jax import memory, sharding, train_step
from flip_jax.config import MeshConfig
from flip_jax.config_check import REMAT

NEEDED = {"none": 1000, "dots": 500, "names": 300, "full": 100}  # bytes, as far as the stand-in of the compiler says


def least(policy, limit=None):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = dataclasses.replace(helpers.MODEL, remat=policy)
    with jax.set_mesh(mesh):
        return memory.least_recompute(dataclasses.replace(helpers.CONFIG, model=model), mesh, limit)


@pytest.fixture
def compiler(monkeypatch):
    """Compiles nothing: says what each policy needs, and refuses the first, as a TPU's compiler does."""

    def lower(program, config, mesh):
        policy = program.graphdef  # what the stand-in of `make_program` left there

        def compile():
            if policy == "none":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large\nby far")
            sizes = {"argument": NEEDED[policy], "temp": 0, "generated_code": 0, "output": 7, "alias": 7}
            stats = types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
            return types.SimpleNamespace(memory_analysis=lambda: stats)

        return types.SimpleNamespace(compile=compile)

    def make_program(config, mesh):
        return train_step.Program(config.model.remat, (), None, None, None)

    monkeypatch.setattr(memory, "lower", lower)
    monkeypatch.setattr(train_step, "make_program", make_program)


@pytest.mark.parametrize("limit, chosen", [(None, "dots"), (556, "dots"), (555, "names"), (333, "full"), (112, "full")])
def test_the_first_that_fits_with_a_tenth_to_spare(compiler, limit, chosen):
    policy, program, peak = least("auto", limit)
    assert (policy, peak) == (chosen, NEEDED[chosen])
    assert memory.peak_bytes(program.step) == peak


def test_nothing_fits(compiler):
    with pytest.raises(
        ValueError, match=r"(?s)global_batch_size 16 does not fit .*remat\n  dots: 0.0 GiB.*\n  full: 0.0 GiB"
    ):
        least("auto", limit=111)
    with pytest.raises(ValueError, match=r"Tried config.model.remat\n  none: RESOURCE_EXHAUSTED: too large$"):
        least("none", limit=10_000)
    assert least("full", limit=1)[0] == "full"  # what was asked for by name is not judged


@pytest.mark.slow
def test_what_is_compiled_keeps_less_from_policy_to_policy_and_runs():
    found = {policy: least(policy) for policy in REMAT}
    peaks = [peak for _, _, peak in found.values()]
    assert peaks == sorted(set(peaks), reverse=True)
    _, program, _ = found["names"]
    assert float(program.step(program.init(), *helpers.batch())[1]["loss"]) > 0
