"""`flip evaluate`: table, chart and JSON, missing data, and equal numbers on any layout of devices."""

import io
import json
import socket
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest
from flax import nnx
from helpers import REPO, environment, png, reference_ranks, unit, write_samples
from PIL import Image

import flip_jax
from flip_jax import weights
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.evaluators import known, retrieval
from flip_jax.models.flip import FLIP
from flip_jax.tools import evaluate

IMAGES, CLASSES = 45, 6
WORDS = ("[PAD]", "[UNK]", "class", "caption", "a", *"0123456789", *(f"##{i}" for i in range(10)))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Save random weights as a step and return the run's folder."""
    step = tmp_path_factory.mktemp("model") / "checkpoints" / "7"
    params = nnx.to_pure_dict(nnx.split(FLIP(helpers.MODEL, nnx.Rngs(0)))[1])
    weights.write(step, params, Tokenizer({word: i for i, word in enumerate(WORDS)}), helpers.CONFIG)
    return step.parent.parent


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """Zero-shot and retrieval on images in CLIP_benchmark's layout, two captions each."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, IMAGES)
    samples = [
        {"png": png(i), "cls": b"%d" % labels[i], "txt": f"caption {i}\na caption {i}".encode()} for i in range(IMAGES)
    ]
    write_samples(folder / "test" / "0.tar", samples[:20])
    write_samples(folder / "test" / "1.tar", samples[20:])
    (folder / "classnames.txt").write_text("".join(f"class {c}\n" for c in range(CLASSES)))
    source = f"webdataset:{folder}/test/{{0,1}}.tar"
    return labels, (f"zeroshot/{source}", f"retrieval/{source}")


def command(model, tasks, *more):
    return [sys.executable, "-m", "flip_jax", "evaluate", f"--model={model}", f"--tasks={','.join(tasks)}", *more]


@pytest.fixture(scope="session")
def evaluated(model, tasks, tmp_path_factory):
    """The command on one device, with a missing data set between two that exist."""
    out = tmp_path_factory.mktemp("out")
    _, (zeroshot, retrieval) = tasks
    more = (f"--json={out}/all.json", f"--chart={out}/all.png", "--batch_size=20", f"--tfds_dir={out}/none")
    done = subprocess.run(
        command(model, (zeroshot, "zeroshot/cifar10", retrieval), *more),
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done, out


def test_the_numbers_are_those_of_the_embeddings(evaluated, model, tasks):
    _, out = evaluated
    labels, (zeroshot, retrieve) = tasks
    encoder = flip_jax.load(model)
    images = [Image.open(io.BytesIO(png(i))) for i in range(IMAGES)]
    image_NxE = np.asarray(encoder.encode_image(images))
    class_CxE = unit(encoder.encode_text([f"a photo of a class {c}." for c in range(CLASSES)]))
    found = json.loads((out / "all.json").read_text())["results"]
    assert found[zeroshot]["top1"] == pytest.approx(100 * np.mean(np.argmax(image_NxE @ class_CxE.T, 1) == labels))
    texts = [f"{a}caption {i}" for i in range(IMAGES) for a in ("", "a ")]
    ranks = reference_ranks(image_NxE, encoder.encode_text(texts), np.repeat(np.arange(IMAGES), 2))
    assert found[retrieve] == pytest.approx(retrieval.recalls(*ranks))


def test_a_missing_data_set_is_reported_and_the_others_are_evaluated(evaluated, tasks):
    done, out = evaluated
    assert done.returncode == 1 and "Traceback" not in done.stderr
    report = json.loads((out / "all.json").read_text())
    assert list(report["results"]) == list(tasks[1])
    assert "tfds build cifar10" in report["errors"]["zeroshot/cifar10"]
    assert done.stderr.startswith("skipped: zeroshot/cifar10: ") and "error: zeroshot/cifar10: " in done.stderr
    assert report["means"] == {
        f"{task.partition('/')[0]}/mean": report["results"][task][name]
        for task, name in zip(tasks[1], ("top1", "mean_recall"), strict=True)
    }
    with Image.open(out / "all.png") as chart:
        assert min(chart.size) > 100
    for task in tasks[1]:
        assert f"{next(iter(report['results'][task].values())):.2f}*" in done.stdout


def test_an_unknown_name_stops_everything(model, tasks):
    with pytest.raises(known.Unknown, match="known are cifar10, "):
        settings = evaluate.change_settings(helpers.CONFIG, {"eval.tasks": [*tasks[1], "zeroshot/cifar1"]}, 1)
        evaluate.evaluate(None, settings)


def test_batches_divide_by_the_devices_and_the_command_line_overrides_the_run():
    settings = evaluate.change_settings(
        helpers.CONFIG, {"eval.batch_size": 20, "eval.mask": "", "data.tfds_dir": "/x"}, 8
    )
    assert settings.eval.batch_size == 24 and settings.data.tfds_dir == "/x"
    assert settings.eval.mask == helpers.CONFIG.eval.mask


def test_the_table_has_the_mean_of_the_headlines_of_each_evaluator():
    results = {
        "zeroshot/pets": {"mean_per_class": 40.0, "top1": 50.0},
        "zeroshot/cifar10": {"top1": 80.0, "mean_per_class": 79.0},
        "retrieval/coco": {"mean_recall": 12.346, "text_recall@1": 10.0},
    }
    none = {"images": 1000, "skipped": {}, "classes_without_images": []}
    images = dict.fromkeys(results, none) | {
        "zeroshot/pets": {"images": 7, "skipped": {"no image": 1, "too large": 2}, "classes_without_images": ["Sphynx"]}
    }
    assert evaluate.table(results, images).splitlines() == [
        "zeroshot  mean_per_class    top1  images",
        "pets              40.00*  50.00        7",
        "cifar10           79.00   80.00*   1,000",
        "mean of *: 60.00",
        "pets: 3 images skipped (1 no image, 2 too large)",
        "pets: classes without images: Sphynx",
        "",
        "retrieval  mean_recall  text_recall@1  images",
        "coco            12.35*         10.00    1,000",
        "mean of *: 12.35",
    ]


def test_long_paths_are_cut_where_that_leaves_them_different():
    same = "/the/same/end/of/both/paths/test/{00000..00007}.tar"
    for ends, shown in (
        (
            (f"{'/long' * 10}/birds/test", f"{'/long' * 10}/cars/test"),
            [f"folder:...{'/long' * 5}/birds/test", f"folder:...{'/long' * 5}/cars/test"],
        ),
        ((f"/birds{same}", f"/cars{same}"), [f"folder:/birds{same}", f"folder:/cars{same}"]),
    ):
        results = {f"zeroshot/folder:{end}": {"top1": 1.0} for end in ends}
        images = dict.fromkeys(results, {"images": 9, "skipped": {}, "classes_without_images": []})
        lines = evaluate.table(results, images).splitlines()
        assert [line.split()[0] for line in lines[1:3]] == shown


def test_on_eight_devices_the_numbers_are_the_same(evaluated, model, tasks):
    encoder = flip_jax.load(model, jax.devices())
    settings = evaluate.change_settings(encoder.config, {"eval.tasks": list(tasks[1]), "eval.batch_size": 12}, 8)
    with jax.set_mesh(encoder.mesh):
        results, images, errors = evaluate.evaluate(encoder, settings)
    assert not errors and settings.eval.batch_size == 16
    expected = json.loads((evaluated[1] / "all.json").read_text())["results"]
    assert {task: pytest.approx(values) for task, values in expected.items()} == results
    assert {task: seen["images"] for task, seen in images.items()} == dict.fromkeys(tasks[1], IMAGES)


@pytest.mark.slow
def test_in_two_processes_of_four_devices_the_numbers_are_the_same(evaluated, model, tasks, tmp_path):
    source = tasks[1][0].partition("/")[2]
    probes = [f"{name}/{source};train={source}" for name in ("linear_probe", "few_shot")]
    encoder = flip_jax.load(model, jax.devices()[:1])
    with jax.set_mesh(encoder.mesh):
        settings = evaluate.change_settings(encoder.config, {"eval.tasks": probes, "eval.batch_size": 16}, 1)
        expected = evaluate.evaluate(encoder, settings).results
    expected |= json.loads((evaluated[1] / "all.json").read_text())["results"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            command(
                model,
                (*tasks[1], *probes),
                f"--json={tmp_path}/all.json",
                "--batch_size=16",
                f"--coordinator={address}",
                "--num_processes=2",
                f"--process_id={i}",
            ),
            cwd=REPO,
            env=environment(devices=4) | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n\n".join(text[-3000:] for text in outputs)
    assert "mean of *" in outputs[0] and "mean of *" not in outputs[1]
    found = json.loads((tmp_path / "all.json").read_text())["results"]
    for results in (expected, found):
        # The labels are noise, on which all strong penalties score alike: rounding picks one of them.
        results[probes[0]].pop("log10_penalty")
    assert found == {task: pytest.approx(values) for task, values in expected.items()}
