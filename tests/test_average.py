"""The running average of the weights: its shares, and that evaluation, loading and export take it."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from helpers import CONFIG, arguments, final_params, leaves, metrics, run_command

import flip_jax
from flip_jax import average, evaluators, manifest, memory, sharding, train_step
from flip_jax.config import MeshConfig, OptimConfig
from flip_jax.tools import convert
from flip_jax.train_step import TrainState


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_each_update_counts_by_its_age_and_the_start_not_at_all(decay):
    seen = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)

    def init():
        return TrainState(jnp.int32(0), {"w": jnp.full(3, 1e6), "frozen": jnp.asarray(seen)}, ())

    def step(state, image, target):
        return TrainState(state.step + 1, state.params | {"w": jnp.asarray(seen)[state.step]}, state.opt_state), {}

    start, advance, abstract, _ = average.keep(decay, init, step, jax.eval_shape(init), jax.eval_shape(init))
    state = start()
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for count in range(1, 7):
        state, _ = jax.jit(advance)(state, None, None)
        weight = decay ** np.arange(count)[::-1]
        # Six sums of numbers near 1.
        np.testing.assert_allclose(state.ema["w"], weight @ seen[:count] / weight.sum(), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(state.ema["frozen"], seen)


def test_without_it_the_state_has_no_such_part_and_with_it_one_more_copy_of_the_weights():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    with jax.set_mesh(mesh):
        states = [
            train_step.make_program(dataclasses.replace(CONFIG, optim=OptimConfig(ema=ema)), mesh).state
            for ema in (0.0, 0.9)
        ]
    assert not hasattr(states[0], "ema")
    assert memory.tree_bytes(states[1]) == memory.tree_bytes(states[0]) + memory.tree_bytes(states[0].params)
    assert jax.tree.map(lambda x: x.sharding, states[1].ema) == jax.tree.map(lambda x: x.sharding, states[0].params)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A checkpoint with an average that differs from the weights, and both."""
    encoder = helpers.make_encoder()
    folder = tmp_path_factory.mktemp("averaged") / "checkpoints" / "3"
    helpers.save(encoder, folder)
    state = {"params": encoder.params, "ema": jax.tree.map(lambda x: x + 0.25, encoder.params)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", state, force=True)
    (folder / manifest.NAME).unlink()
    manifest.write(epath.Path(folder))
    return folder, state


def test_a_model_is_loaded_and_exported_with_the_average(step, tmp_path):
    folder, state = step
    out = tmp_path / "exported"
    convert.export(str(folder), str(out))
    for model in (flip_jax.load(folder), flip_jax.load(out)):
        for loaded, expected in zip(leaves(model.params), leaves(state["ema"]), strict=True):
            np.testing.assert_array_equal(loaded, expected)


@pytest.mark.slow
def test_a_run_evaluates_its_average_and_resumes_it_with_the_same_bits(shards, tmp_path):
    task = f"zeroshot/webdataset:{shards}/*.tar"
    settings = {"optim.ema": 0.9, "optim.name": "lamb", "optim.schedule": "constant", "optim.clip_norm": 1.0}
    settings |= {"eval.tasks": task, "eval.classnames": shards / "classes.txt", "eval.batch_size": 64}
    settings |= {"warmup_samples": 64}
    run_command(arguments(shards, tmp_path / "whole", **settings, **{"total_samples": 320}))
    for samples in (160, 320):
        run_command(arguments(shards, tmp_path / "parts", **settings, **{"total_samples": samples}))
    averages = [final_params(tmp_path / name, 10) for name in ("whole", "parts")]
    for one, other in zip(*map(leaves, averages), strict=True):
        np.testing.assert_array_equal(one, other)
    encoder = flip_jax.load(tmp_path / "whole")
    with jax.set_mesh(encoder.mesh):
        found = evaluators.evaluate(encoder, task, encoder.config)
    (logged,) = [line for line in metrics(tmp_path / "whole") if f"{task}/top1" in line]
    assert {name: logged[f"{task}/{name}"] for name in found} == found
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(tmp_path / "whole" / "checkpoints" / "10" / "state")
    assert not all(map(np.array_equal, leaves(state["params"]), leaves(averages[0])))
