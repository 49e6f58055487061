"""main.py as a user runs it: on generated pictures, killed, stopped, resumed, and given nonsense."""

import logging
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import REPO, arguments, environment, final_params, leaves, metrics, run_command
from PIL import Image

from flip_jax import config_check, train
from flip_jax.runtime import UserError


@pytest.fixture(scope="session")
def undisturbed(shards, tmp_path_factory):
    """A run from start to end, with evaluation."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = run_command(
        arguments(
            shards,
            workdir,
            **{
                "eval.tasks": f"zeroshot/webdataset:{shards}/*.tar",
                "eval.classnames": shards / "classes.txt",
                "eval.every_steps": 12,
                "eval.batch_size": 40,
            },
        )
    )
    return workdir, done


def test_a_run_learns_evaluates_and_ends(undisturbed):
    workdir, done = undisturbed
    lines = metrics(workdir)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    top1 = [line["zeroshot/mean"] for line in lines if "zeroshot/mean" in line]
    assert len(top1) == 2 and top1[-1] > 2 * 100 / 8  # twice chance
    assert "over 8 classes" in done.stdout
    assert "step 24/24" in done.stdout and "images/s" in done.stdout
    # The evaluation and the save of the last step are still to come.
    assert re.search(r"step 24/24 .* left 0:0\d:\d\d\n", done.stdout)
    for step in (5, 10, 15, 20, 24):
        begun, ended = f"saving step {step} ...\n", rf"saved step {step} \([\d.e-]+ GB, \d+ s\)\n"
        assert re.search(ended, done.stdout[done.stdout.index(begun) :])
    last = [line for line in lines if "data/read" in line][-1]
    assert last["data/read"] == last["data/used"] == last["samples_seen"] == 768


def test_the_report_draws_three_pictures_and_ends_with_the_accuracy(undisturbed):
    workdir, _ = undisturbed
    done = run_command(
        [sys.executable, "-m", "flip_jax", "report", f"--model={workdir}", "--queries=red square,blue frame"]
    )
    for name in ("loss.png", "zeroshot.png", "retrieval.png"):
        with Image.open(workdir / "report" / name) as picture:
            assert min(picture.size) > 100
    last = [line for line in metrics(workdir) if "zeroshot/mean" in line][-1]
    top1, top5 = (next(value for key, value in last.items() if key.endswith(end)) for end in ("/top1", "/top5"))
    assert done.stdout.endswith(f"zero-shot top-1 {top1:.2f} % top-5 {top5:.2f} % over 8 classes\n")


def train_here(command, workdir):
    """Does in this process what a command line does."""
    settings = [word for word in command if word.startswith("--config")]
    train.train(config_check.read_recipe(settings), str(workdir))


def test_a_finished_run_says_so(undisturbed, caplog):
    workdir, first = undisturbed
    with caplog.at_level(logging.INFO):
        train_here(first.args, workdir)
    assert "all 24 steps of this run are done" in caplog.text


def test_another_config_is_refused_and_damages_nothing(undisturbed):
    workdir, first = undisturbed
    before = leaves(final_params(workdir))
    changed = [word for word in first.args if not word.startswith("--config.model.image.mask_ratio=")]
    with pytest.raises(UserError) as refused:
        train_here([*changed, "--config.model.image.mask_ratio=0.25", "--config.seed=1"], workdir)
    assert "config.model.image.mask_ratio: checkpoint 0.5, now 0.25" in str(refused.value)
    assert "config.seed: checkpoint 0, now 1" in str(refused.value)
    for one, other in zip(before, leaves(final_params(workdir)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_killed_at_any_step_and_started_again_the_run_ends_with_the_same_bits(undisturbed, shards, tmp_path):
    """SIGKILL twice, at moments drawn anew for each run of the test, which reads with 2 workers, then 1, then none."""
    workdir, first = undisturbed
    command = [arg.replace(str(workdir), str(tmp_path)) for arg in first.args]
    seconds = np.random.default_rng().uniform(0, 3, size=2)
    for wait, workers in zip(seconds, (2, 1), strict=True):
        reading = [arg.replace("data.workers=0", f"data.workers={workers}") for arg in command]
        assert reading != command
        process = subprocess.Popen(
            reading, cwd=REPO, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        started, lines = time.time(), count_lines(tmp_path)
        while process.poll() is None and count_lines(tmp_path) == lines and time.time() - started < 200:
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_command(command)
    for one, other in zip(leaves(final_params(workdir)), leaves(final_params(tmp_path)), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=f"killed {seconds} s after the first log line")
    assert [x["loss"] for x in metrics(workdir) if "loss" in x] == [x["loss"] for x in metrics(tmp_path) if "loss" in x]


def count_lines(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(undisturbed, shards, tmp_path):
    workdir, first = undisturbed
    own = [word for word in first.args if not word.startswith("--config.checkpoint.every_steps=")]
    command = [word.replace(str(workdir), str(tmp_path)) for word in own] + ["--config.checkpoint.every_steps=0"]
    process = subprocess.Popen(command, cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 0
    assert "SIGTERM: saved step" in rest
    assert "resumed at step" in run_command(command).stderr
    for one, other in zip(leaves(final_params(workdir)), leaves(final_params(tmp_path)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_sigterm_in_an_evaluation_saves_without_its_end(shards, tmp_path):
    task = f"zeroshot/webdataset:{shards}/{{00000..00001}}.tar"
    settings = {"eval.tasks": task, "eval.classnames": shards / "classes.txt", "eval.batch_size": 1}
    command = arguments(shards, tmp_path, **settings, **{"eval.every_steps": 12, "total_samples": 32_000})
    process = subprocess.Popen(command, cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 12/"):  # 8 texts and 128 images follow, one at a time
            process.send_signal(signal.SIGTERM)
            break
    said = process.stdout.read()
    assert process.wait(timeout=120) == 0
    assert "step 12 is not evaluated, because the run stops: flip evaluate does it\n" in said
    assert said.splitlines()[-1].startswith("SIGTERM: saved step 12 of 1000 in ")
    assert not [line for line in metrics(tmp_path) if "zeroshot/mean" in line]


@pytest.mark.slow
def test_init_from_takes_the_weights_only(undisturbed, shards, tmp_path):
    workdir, _ = undisturbed
    changes = {"init_from": workdir, "total_samples": 32, "warmup_samples": 0, "optim.base_learning_rate": 1e-12}
    done = run_command(arguments(shards, tmp_path, **changes))
    assert "started from the weights in" in done.stderr
    for one, other in zip(leaves(final_params(workdir)), leaves(final_params(tmp_path, 1)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)  # weights near 1, rounded once by a step of nearly 0
    wider = run_command(arguments(shards, tmp_path / "wider", **changes, **{"model.embed_dim": 8}), check=False)
    assert wider.returncode == 1
    assert "image_projection.kernel: checkpoint (32, 16), model (32, 8)" in wider.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_keys(shards, tmp_path):
    done = run_command(
        arguments(shards, tmp_path, **{"optim.base_learning_rate": 1e30, "warmup_samples": 0}), check=False
    )
    assert done.returncode == 1
    assert re.search(r"error: the loss of step \d+ is (nan|inf); .* Its samples: \['0000[01].tar/", done.stderr)
    assert list(tmp_path.glob("nonfinite_*.txt"))[0].read_text().count("\n") == 32
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.image.mask_ratio": 1.5}, "config.model.image.mask_ratio must be in [0, 1), got 1.5"),
        ({"model.image.image_size": 33}, "config.model.image.image_size 33 does not divide by patch_size 8"),
        ({"data.train": "webdataset:/nowhere/*.tar"}, "/nowhere/*.tar"),
        ({"data.train": ""}, "config.data.train"),
        ({"data.train": "parquets:/nowhere"}, "parquets"),
        ({"data.vocab": "/nowhere/vocab.txt"}, "/nowhere/vocab.txt"),
        ({"model.imagee.mask_ratio": 0.5}, "imagee"),
        ({"init_from": "/nowhere"}, "/nowhere holds no checkpoint"),
    ],
)
def test_bad_settings_end_in_one_clear_error(shards, tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train_here(arguments(shards, tmp_path, **change), tmp_path)


def test_a_workdir_that_cannot_be_made_is_one_clear_error(shards, tmp_path):
    (tmp_path / "file").touch()
    done = run_command(arguments(shards, tmp_path / "file" / "run"), check=False)
    assert done.returncode == 1 and "cannot be made or written to: [Errno 20] Not a directory" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr[-2000:]


def test_a_batch_that_does_not_divide_by_the_devices_is_refused(shards, tmp_path):
    done = run_command(arguments(shards, tmp_path), check=False, devices=5)
    assert "config.global_batch_size 32 does not divide by the 5 devices" in done.stderr
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_damaged_records_are_counted_and_the_run_goes_on(shards, tmp_path):
    data = tmp_path / "damaged"
    data.mkdir()
    (data / "00000.tar").write_bytes((shards / "00000.tar").read_bytes())
    whole = (shards / "00001.tar").read_bytes()
    (data / "00001.tar").write_bytes(whole[: len(whole) // 2 + 100])
    changes = {"data.train": f"webdataset:{data}/*.tar", "data.max_bad_fraction": 0.5}
    run_command(arguments(shards, tmp_path / "run", **changes))
    last = [line for line in metrics(tmp_path / "run") if "data/read" in line][-1]
    bad = {key: value for key, value in last.items() if key.startswith("data/bad/")}
    assert last["data/bad/tar cut short"] > 0
    assert last["data/read"] == last["data/used"] + sum(bad.values())
    assert last["data/used"] == 768
