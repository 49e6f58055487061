"""Runs in stages end with the same bits wherever they are killed, and a run of one stage is one without stages."""

import dataclasses
import multiprocessing
import re
import shutil
import signal
import time

import numpy as np
import pytest
import staged_worker
from helpers import BOUNDARIES, CONFIG, STAGES, STEPS, final_params, leaves, metrics, model_with

from flip_jax import config_check, train
from flip_jax.config import CheckpointConfig, Config, DataConfig, MeshConfig
from flip_jax.runtime import UserError
from flip_jax.tools import card, report


def tiny(shards, text, fsdp=2, workers=0, **changes) -> Config:
    """Settings of a run with learned positions that saves, and so logs, every step."""
    config = dataclasses.replace(
        CONFIG,
        stages=text,
        data=DataConfig(train=f"webdataset:{shards}/*.tar", shuffle_window=50, workers=workers, threads=1),
        model=model_with(image_positions="learned", image_depth=1, text_depth=1, text_vocab_size=100, unroll=True),
        mesh=MeshConfig(fsdp=fsdp),
        checkpoint=CheckpointConfig(every_steps=1, keep=99),
        **changes,
    )
    return config_check.from_config_dict(dataclasses.asdict(config))


def run(shards, workdir, text=STAGES, **changes):
    """Trains on the eight devices of these tests."""
    train.train(tiny(shards, text, **changes), workdir)


def same(one, other, step):
    for x, y in zip(leaves(final_params(one, step)), leaves(final_params(other, step)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """A run of three stages that nothing disturbed, with all its steps."""
    workdir = tmp_path_factory.mktemp("whole")
    run(shards, workdir)
    return workdir


@pytest.mark.slow
def test_a_staged_run_from_start_to_end(whole, shards, tmp_path, capsys):
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    samples = [16, 32, 48, 64, 88, 112, 120, 128, 136, 144]
    assert [line["samples_seen"] for line in lines] == [line["data/used"] for line in lines] == samples

    def cosine(share):
        return 0.5 * (1 + np.cos(np.pi * share))

    # Each stage by its own schedule: base rates are of 256 samples, and each begins with its warm-up.
    peaks = (3.2e-3 * 16 / 256, 3.2e-3 * 24 / 256, 1e-3 * 8 / 256)
    shares = ([0, 0.5, 1, cosine(1 / 2)], [1, 1], [0, 1, cosine(1 / 3), cosine(2 / 3)])
    rates = [peak * share for peak, some in zip(peaks, shares, strict=True) for share in some]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-5)
    # Step 7, the first of the last stage, has the rate 0 of a warm-up's first step: the optimizer counts with it.
    at = {step: leaves(final_params(whole, step)) for step in (6, 7, 8)}
    assert all(np.array_equal(x, y) for x, y in zip(at[6], at[7], strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(at[7], at[8], strict=True))
    assert final_params(whole, 4)["image"]["pos_embed"].shape == (1, 1 + 4, 32)
    assert final_params(whole, 5)["image"]["pos_embed"].shape == (1, 1 + 16, 32)
    assert (
        card.from_model(whole)["samples_seen"] == 144
        and card.from_model(whole / "checkpoints" / "5")["samples_seen"] == 88
    )
    report.local(whole, tiny(shards, STAGES))
    assert re.search(r"\n[\d.,]+, then [\d.,]+, then [\d.,]+ images/s here: .* 144 samples,", capsys.readouterr().out)
    run(shards, whole)
    assert capsys.readouterr().out == ""  # it is done
    with pytest.raises(UserError, match="stage 3 is missing now"):
        run(shards, whole, STAGES.rpartition(";")[0])


@pytest.mark.parametrize("killed_after", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5, 6))])
def test_resumed_anywhere_it_ends_with_the_same_bits(whole, shards, tmp_path, capsys, killed_after):
    """Later steps are removed, as if the run had been killed before it saved them."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in range(killed_after + 1, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    run(shards, workdir)
    same(whole, workdir, STEPS)
    losses, resumed = ({line["step"]: line["loss"] for line in metrics(path)} for path in (whole, workdir))
    assert losses == resumed
    said = capsys.readouterr().out
    assert f"step 10/10  stage 3/3: samples 144  loss {losses[10]:.4f}" in said
    assert ("stage 1/3: compiled" in said) == (killed_after < BOUNDARIES[0])


@pytest.mark.slow
def test_worker_processes_read_the_same_across_boundaries(whole, shards, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for step in range(BOUNDARIES[0], STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    run(shards, tmp_path / "run", workers=2)
    same(whole, tmp_path / "run", STEPS)


@pytest.mark.slow
def test_later_stages_change_after_a_boundary(whole, shards, tmp_path, capsys):
    """A run that is at the end of its first stage gets another second one, and ends as if it had always had it."""
    other = STAGES.partition(";")[0] + ";32:optim.state=fresh,warmup_samples=0"
    run(shards, tmp_path / "other", other)
    shutil.copytree(whole, tmp_path / "run")
    for step in range(BOUNDARIES[0] + 1, STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    run(shards, tmp_path / "run", other)
    assert "config.stages: those after stage 1, which have not begun, changed from 48:" in capsys.readouterr().out
    same(tmp_path / "other", tmp_path / "run", 6)


@pytest.mark.slow
def test_a_run_of_one_stage_is_one_without_stages(shards, tmp_path):
    run(shards, tmp_path / "plain", "", total_samples=64)
    run(shards, tmp_path / "staged", "64", total_samples=64)
    same(tmp_path / "plain", tmp_path / "staged", 4)
    plain, staged = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "staged"))
    assert plain == staged
    # And such a run goes on with a stage that is added to it.
    run(shards, tmp_path / "plain", "64;32:model.image.mask_ratio=0,warmup_samples=0", total_samples=64)
    assert metrics(tmp_path / "plain")[-1]["samples_seen"] == 96


@pytest.mark.slow
@pytest.mark.parametrize("devices, fsdp", [(1, 1), (8, 2)])
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bits(shards, tmp_path, devices, fsdp):
    """SIGKILL, ten times in each of two runs, at moments around the boundaries that are drawn anew for each test."""
    text = "96:model.image.image_size=16;120:global_batch_size=24,model.image.mask_ratio=0;48:global_batch_size=8,"
    config, last = tiny(shards, text + "optim.state=fresh", fsdp), 6 + 5 + 6
    processes = multiprocessing.get_context("forkserver")  # a server imports what they need, once
    processes.set_forkserver_preload(["staged_worker"])

    def start(workdir):
        process = processes.Process(target=staged_worker.run, args=(config, str(workdir), devices))
        process.start()
        return process

    def written(workdir):
        return metrics(workdir) if (workdir / "metrics.jsonl").exists() else []

    def to_the_end(workdir):
        process = start(workdir)
        process.join()
        assert process.exitcode == 0

    to_the_end(tmp_path / "whole")
    random, killed = np.random.default_rng(), []
    for name in ("one", "two"):
        workdir = tmp_path / name
        for target in sorted(random.integers(4, 14, 10)):  # boundaries are at 6 and 11
            before, process = written(workdir), start(workdir)
            while process.is_alive() and (written(workdir) == before or written(workdir)[-1]["step"] < target):
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5))
            process.kill()
            process.join()
            assert process.exitcode in (-signal.SIGKILL, 0)  # 0: it was done before
            killed.append(written(workdir)[-1]["step"])
        to_the_end(workdir)
        same(tmp_path / "whole", workdir, last)
    print(f"killed after steps {killed}")
