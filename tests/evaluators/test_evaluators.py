"""Tasks, datasets, labels and zero-shot accuracies, against values computed by NumPy from the embeddings."""

import dataclasses
import io
import json
import re
import sys

import numpy as np
import pytest
from etils import epath
from helpers import REPO, SIZE, Known, eval_config, picture, run_command, unit, write_samples

from flip_jax import evaluators
from flip_jax.config import Config, EvalConfig, FinetuneConfig
from flip_jax.data import classes as class_lists
from flip_jax.evaluators import datasets, known, zeroshot
from flip_jax.runtime import UserError


@pytest.fixture
def classified(tmp_path):
    """Writes 37 images of 7 classes in CLIP_benchmark's layout; returns source, labels, image and class embeddings."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 37)  # the last class has no image
    write_samples(tmp_path / "test" / "0.tar", [{"png": picture(i), "cls": b"%d" % y} for i, y in enumerate(labels)])
    (tmp_path / "classnames.txt").write_text("".join(f"class {c}\n" for c in range(7)))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}\n")
    return f"webdataset:{tmp_path}/test/*.tar", labels, unit(rng.normal(size=(37, 8))), unit(rng.normal(size=(7, 8)))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [16, 40])
def test_accuracies_match_numpy_for_any_batch_size_and_device_count(classified, devices, batch_size):
    source, labels, image_NxE, class_CxE = classified
    encoder = Known(image_NxE, {f"class {c}": class_CxE[c] for c in range(7)}, devices)
    settings = eval_config(f"zeroshot/{source}", batch_size=batch_size)
    found = dict(evaluators.run(encoder, settings))
    rank = np.argsort(np.argsort(-(image_NxE @ class_CxE.T), axis=1), axis=1)[np.arange(37), labels]
    per_class = [100 * np.mean(rank[labels == c] == 0) for c in range(6)]
    expected = {"top1": 100 * np.mean(rank == 0), "top5": 100 * np.mean(rank < 5), "mean_per_class": np.mean(per_class)}
    assert found.pop("zeroshot/mean") == pytest.approx(expected["top1"])
    assert found == pytest.approx({f"zeroshot/{source}/{name}": value for name, value in expected.items()})


def test_model_that_returns_nan_scores_zero(classified):
    source, _, image_NxE, _ = classified
    encoder = Known(np.full_like(image_NxE, np.nan), {f"class {c}": np.full(8, np.nan) for c in range(7)})
    assert set(dict(evaluators.run(encoder, eval_config(f"zeroshot/{source}"))).values()) == {0.0}


def labels_of(task, settings):
    """Returns a task's data set and the labels and masks of all its rows."""
    _, dataset = evaluators.find(task, settings)
    batches = list(datasets.labelled(dataset, settings))
    return dataset, np.concatenate([b["label"] for b in batches]), np.concatenate([b["mask"] for b in batches])


def write_folders(root, names, images=1):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(images):
            (root / name / f"{j}.PNG").write_bytes(picture(i))
        (root / name / "notes.txt").write_text("not an image")
    return root


def test_folder_per_class(tmp_path):
    write_folders(tmp_path, ["red_fox", "owl"], images=3)
    dataset, label, mask = labels_of(f"zeroshot/folder:{tmp_path}", eval_config(batch_size=8))
    assert dataset.classes == ("owl", "red fox") and dataset.templates == ("a photo of a {}.",)
    assert label[mask].tolist() == [0, 0, 0, 1, 1, 1] and mask.sum() == 6


def test_classes_are_matched_by_name_and_other_classes_ignored(tmp_path):
    """Checks ImageNet-A: 200 of ImageNet's classes, whose folders are named by WordNet ids."""
    classes, wnids = known.recorded_classes("imagenet_a")
    assert len(classes) == len(wnids) == 200
    folders = [*wnids[::-1], "n01440764"]  # the tench is not in ImageNet-A
    write_folders(tmp_path, folders)
    dataset, label, mask = labels_of(f"zeroshot/imagenet_a=folder:{tmp_path}", eval_config(batch_size=64))
    names = sorted(folders)
    expected = [wnids.index(name) if name in wnids else -1 for name in names]
    assert label[: len(names)].tolist() == expected and mask.sum() == 200
    assert dataset.classes[wnids.index("n01498041")] == "stingray" and len(dataset.templates) == 7
    assert len(evaluators.find(f"zeroshot/imagenet_a_80=folder:{tmp_path}", eval_config())[1].templates) == 80


def test_folders_named_by_numbers_are_matched_in_numeric_order(tmp_path):
    write_folders(tmp_path, [f"{i:05}" for i in range(43)])  # the folder names of GTSRB
    _, label, mask = labels_of(f"zeroshot/gtsrb=folder:{tmp_path}", eval_config(batch_size=64))
    assert label[mask].tolist() == list(range(43))


def test_tars_with_class_names_are_matched_by_name(tmp_path):
    names = ["ship", "truck", "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse"]
    write_samples(tmp_path / "test" / "0.tar", [{"png": picture(0), "cls": b"%d" % i} for i in range(10)])
    (tmp_path / "classnames.txt").write_text("\n".join(names))
    dataset, label, mask = labels_of(f"zeroshot/cifar10=webdataset:{tmp_path}/test/*.tar", eval_config())
    assert [dataset.classes[i] for i in label[mask]] == names and len(dataset.templates) == 18


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["airplane", "bird", "house"],
            "cifar10: airplane, bird, house; wanted airplane, .*10 in all. .*source: house. ",
        ),
        ([f"class {i}" for i in range(10)], "has other classes than cifar10: .* Missing in the source: airplane, "),
    ],
)
def test_source_with_other_classes_is_refused(tmp_path, names, message):
    write_folders(tmp_path, names)
    with pytest.raises(UserError, match=message):
        labels_of(f"zeroshot/cifar10=folder:{tmp_path}", eval_config())


@pytest.mark.parametrize(
    "samples, message",
    [
        (
            [{"cls": b"0"}, {"cls": b"7"}, {"cls": b"8"}],
            "2 of 3 images of a batch: the first, 0.tar/s00001, has label 7, outside",
        ),
        ([{"cls": b"0"}, {"txt": b"a"}], "1 of 2 images of a batch: the first, 0.tar/s00001, has no label"),
        (
            [{"cls": b"0", "png": b"not an image"}],
            r"none of the images of .* can be used: 1 skipped \(1 image does not decode\)",
        ),
    ],
)
def test_labels_outside_the_classes_and_empty_splits_are_refused(classified, tmp_path, samples, message):
    source, _, image_NxE, _ = classified
    write_samples(tmp_path / "test" / "0.tar", [{"png": picture(0)} | parts for parts in samples])
    with pytest.raises(UserError, match=message):
        dict(evaluators.run(Known(image_NxE, {}), eval_config(f"zeroshot/{source}")))


def test_class_names_may_differ_only_in_punctuation(tmp_path):
    """Checks names of emoji, the keycaps # and *."""
    write_folders(tmp_path, ["keycap #", "keycap *", "owl"])
    _, label, mask = labels_of(f"zeroshot/emoji=folder:{tmp_path}", eval_config())
    assert label[mask].tolist() == [0, 1, 2]


def test_docs_contain_the_table_of_datasets():
    assert known.listing() in (REPO / "docs" / "evaluation.md").read_text()


def test_prompt_without_braces_is_refused(classified, tmp_path):
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na photo\n")
    with pytest.raises(UserError, match="each prompt needs one {} for the class name, got 'a photo'"):
        evaluators.find(f"zeroshot/webdataset:{tmp_path}/test/*.tar", eval_config(batch_size=56))


def test_classnames_file_is_read_and_checked(classified, tmp_path):
    source = f"webdataset:{tmp_path}/test/*.tar"
    (tmp_path / "classnames.txt").unlink()
    with pytest.raises(UserError, match="has no class names.* config.eval.classnames must be a file"):
        evaluators.find(f"zeroshot/{source}", eval_config(batch_size=24))
    for file, text in {"lines.txt": "red fox\nowl\n", "list.json": json.dumps(["red fox", "owl"])}.items():
        (tmp_path / file).write_text(text)
        _, dataset = evaluators.find(f"zeroshot/{source}", eval_config(classnames=str(tmp_path / file)))
        assert dataset.classes == ("red fox", "owl")
    (tmp_path / "twice.txt").write_text("owl\nfox\nowl\nfox\nowl\n")
    with pytest.raises(UserError, match="3 of the 5 class names are repeated, first 'owl'"):
        evaluators.find(f"zeroshot/{source}", eval_config(classnames=str(tmp_path / "twice.txt")))
    with pytest.raises(UserError, match="'/nowhere' is not a file. config.eval.classnames must be"):
        evaluators.find(f"zeroshot/{source}", eval_config(classnames="/nowhere"))


@pytest.mark.parametrize(
    "content, message", [(b"[1, 2]", "not strings"), (b'["owl",', "cannot be read"), (b"\xff\xfe", "cannot be read")]
)
def test_damaged_classnames_file_is_refused(classified, tmp_path, content, message):
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(UserError, match=f"{message}.* config.eval.classnames must be a file"):
        evaluators.find(f"zeroshot/{classified[0]}", eval_config(classnames=str(tmp_path / "names")))


@pytest.mark.parametrize(
    "task, message",
    [
        ("zeroshoot/cifar10", "'zeroshoot/cifar10' must be EVALUATOR/DATASET with EVALUATOR one of zeroshot, "),
        ("zeroshot", "'zeroshot' must be EVALUATOR/DATASET"),
        ("zeroshot/cifar", "zeroshot/cifar: unknown data set 'cifar': known are cifar10, cifar100, cars"),
        ("zeroshot/imagenet-a", "unknown data set 'imagenet-a': known are imagenet_a, "),
        ("zeroshot/cifr10=folder:/x", "unknown data set 'cifr10': known are cifar10, "),
        ("zeroshot/foldr:/x", 'source must be "KIND:REST" with KIND one of webdataset, '),
        ("zeroshot/coco", "zeroshot/coco: .*coco/dataset_coco.json.* Put Karpathy's dataset_coco.json"),
        ("zeroshot/cifar10", r"`tfds build cifar10 --file_format=array_record --data_dir=\S+/none`"),
        ("zeroshot/gtsrb", r"clip_benchmark_export_wds --dataset gtsrb --split test .* --output \S+/none/gtsrb`"),
        ("zeroshot/ucf101;train=folder:/x", "zeroshot/ucf101;.*/none/ucf101/test"),
        ("zeroshot/ucf101", r"/none/ucf101/test.* Put the images there, in one folder per class"),
    ],
)
def test_unknown_or_missing_data_are_refused_with_a_remedy(tmp_path, task, message):
    with pytest.raises(UserError, match=message):
        evaluators.find(task, eval_config(tfds_dir=tmp_path / "none"))


@pytest.mark.parametrize(
    "task, unknown",
    [("zeroshot/cifar", True), ("zero/cifar10", True), ("zeroshot/cifar10", False), ("zeroshot/folder:/none", False)],
)
def test_unknown_names_are_told_from_missing_data(tmp_path, task, unknown):
    with pytest.raises(UserError) as raised:
        evaluators.find(task, eval_config(tfds_dir=tmp_path / "none"))
    assert isinstance(raised.value, known.Unknown) == unknown


def test_a_mistyped_later_task_is_named_by_itself():
    entry = "zeroshot/webdataset:/a/{0,1}.tar, zeroshoot/emoji,retrieval/coco"
    config = Config(eval=EvalConfig(tasks=(entry,)))
    assert evaluators.tasks(config) == ["zeroshot/webdataset:/a/{0,1}.tar", "zeroshoot/emoji", "retrieval/coco"]
    with pytest.raises(UserError, match="^'zeroshoot/emoji' must be EVALUATOR/DATASET"):
        evaluators.find(evaluators.tasks(config)[1], config)


def test_all_known_datasets_have_names_prompts_and_a_metric():
    templates = known.recorded_templates()
    without_names = {"emoji", "objectnet", "objectnet_80", "coco", "flickr30k"}
    for name, row in known.KNOWN.items():
        classes, labels = known.recorded_classes(row.classes or name)
        index_named = name.startswith(("dsprites", "smallnorb"))  # TFDS has only numbers as class names
        assert bool(classes) != (name in without_names or index_named), name
        assert not labels or len(labels) == len(classes) == len(set(labels)), name
        assert labels or len(classes) == len(set(classes)), name
        assert row.metric in ("top1", "mean_per_class", known.CAPTIONS), name
        if row.metric != known.CAPTIONS:
            assert all(prompt.count("{}") == 1 for prompt in templates[row.templates or name]), name
    sizes = {"imagenet": 1000, "imagenet_r": 200, "sun397": 397, "cars": 196, "aircraft": 100, "ucf101": 101}
    assert {name: len(known.recorded_classes(name)[0]) for name in sizes} == sizes
    assert sum(row.test.startswith("tfds:") for row in known.KNOWN.values()) >= 25


def test_recorded_labels_match_those_of_tfds(tmp_path):
    """Compares what TFDS knows before it has downloaded a data set."""
    tfds, checked = pytest.importorskip("tensorflow_datasets"), []
    for name, row in known.KNOWN.items():
        if not row.test.startswith("tfds:") or name.startswith(("emoji", "clevr", "dsprites", "smallnorb")):
            continue
        builder = re.match("tfds:(.+)/", row.test)[1]
        names = tfds.builder(builder, data_dir=tmp_path).info.features["label"].names
        classes, labels = known.recorded_classes(row.classes or name)
        class_index = class_lists.match(row.test, names, class_lists.ClassList(classes, name, labels, True)).index
        assert sorted(class_index[class_index >= 0]) == list(range(len(classes))), name
        if labels and names[1] != "1":
            assert [names[i] for i in np.argsort(class_index)[-len(classes) :]] == list(labels), name
            checked.append(name)
    assert len(checked) >= 15, checked


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Builds a TFDS data set with CIFAR-10's classes in reverse order and 3 to 10 objects per image."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder, names = tmp_path_factory.mktemp("tfds"), list(known.recorded_classes("cifar10")[0][::-1])

    class TinyThings(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = epath.Path(__file__)

        def _info(self):
            things = tfds.features.Sequence({"color": tfds.features.ClassLabel(num_classes=3)})
            features = {
                "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=names),
                "angle": tfds.features.ClassLabel(num_classes=4),
                "objects": things,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(20)), "validation": self._generate_examples(range(20, 30))}

        def _generate_examples(self, numbers):
            for i in numbers:
                things = [{"color": 1}] * (3 + i % 8)
                yield i, {"image": io.BytesIO(picture(i)), "label": i % 10, "angle": i % 4, "objects": things}

    TinyThings(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_labels_may_be_another_feature_or_a_count(tfds_dir):
    def labels(task):
        settings = eval_config(tfds_dir=tfds_dir, batch_size=8)
        _, dataset = evaluators.find(f"zeroshot/{task}", settings)
        found = {}
        for batch in datasets.labelled(dataset, settings):
            rows = zip(batch["image"][:, 0, 0, 0], batch["label"], batch["mask"], strict=True)
            found |= {int(i): int(label) for i, label, real in rows if real}
        return dataset, found

    dataset, found = labels("cifar10=tfds:tiny_things/validation")
    assert found == {i: 9 - i % 10 for i in range(20, 30)} and dataset.classes[0] == "airplane"
    dataset, found = labels("tfds:tiny_things/train")
    assert found == {i: i % 10 for i in range(20)} and dataset.classes[0] == "truck"
    dataset, found = labels("tfds:tiny_things/train+validation#angle")
    assert found == {i: i % 4 for i in range(30)} and dataset.classes == ("0", "1", "2", "3")
    dataset, found = labels("clevr_count=tfds:tiny_things/train[50%:]#len:objects/color")
    assert len(found) == 10 and found == {i: i % 8 for i in found} and dataset.classes[0] == "three"
    with pytest.raises(UserError, match="nonesuch.*angle"):
        labels("tfds:tiny_things/train#nonesuch")


def test_training_split(tfds_dir):
    settings = eval_config(tfds_dir=tfds_dir)
    _, dataset = evaluators.find("zeroshot/cifar10=tfds:tiny_things/validation;train=tfds:tiny_things/train", settings)
    assert sum(batch["mask"].sum() for batch in datasets.labelled(dataset, settings, "train")) == 20
    _, dataset = evaluators.find("zeroshot/cifar10=tfds:tiny_things/validation", settings)
    with pytest.raises(UserError, match="cifar10 has no train split: add ';train=SOURCE' to the task"):
        next(datasets.labelled(dataset, settings, "train"))


@pytest.mark.parametrize(
    "evaluator, classes, message",
    [
        ("zeroshot", 5, "a fine-tuned classifier reads no text; use classify, linear_probe or few_shot"),
        ("retrieval", 5, "a fine-tuned classifier reads no text; use classify, linear_probe or few_shot"),
        ("classify", 0, r"the model is not a classifier \(config.finetune.classes is 0\)"),
    ],
)
def test_tasks_that_do_not_suit_the_model_are_refused(classified, evaluator, classes, message):
    config = dataclasses.replace(eval_config(), finetune=FinetuneConfig(classes=classes))
    with pytest.raises(UserError, match=message):
        evaluators.find(f"{evaluator}/{classified[0]}", config)


LOADED = """
import sys
from flip_jax import evaluators
from flip_jax.config import Config, EvalConfig
for every_steps in (0, 10):
    assert not evaluators.problems(Config(eval=EvalConfig(every_steps=every_steps, tasks=())))
print(*sys.modules)
"""


def test_no_evaluator_is_loaded_without_a_task():
    done = run_command([sys.executable, "-c", LOADED])
    ours = {name for name in done.stdout.split() if name.startswith("flip_jax.evaluators")}
    assert ours == {"flip_jax.evaluators"}
    assert not {"scipy.optimize", "matplotlib.pyplot", "tqdm"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "name, short",
    [
        ("imagenet", "imagenet"),
        ("folder:/data/birds", "folder:/data/birds"),
        (
            "zeroshot/cars=webdataset:gs://bucket/copies/of/others/cars/test/{00000..00007}.tar",
            "zeroshot/cars=webdataset:.../others/cars/test/{00000..00007}.tar",
        ),
        (
            "webdataset:/a/long/folder/of/our/own/data/birds/test/*.tar;train=folder:/data/birds",
            "webdataset:.../of/our/own/data/birds/test/*.tar;train=folder:/data/birds",
        ),
    ],
)
def test_paths_are_cut_to_their_ends(name, short):
    assert datasets.shortened(name) == short


def test_without_a_terminal_prompts_are_counted_in_lines(monkeypatch, capsys):
    names, templates = [f"class {i}" for i in range(7)], ["a {}", "the {}", "{}"]
    texts = {template.replace("{}", name): np.full(2, i) for i, name in enumerate(names) for template in templates}
    monkeypatch.setattr(datasets, "SAY_EVERY", 0)
    found = zeroshot.class_embeddings(Known(np.zeros((1, 2)), texts), names, templates, 8)
    np.testing.assert_allclose(found[1:], 0.5**0.5, rtol=1e-6)
    assert capsys.readouterr().out.splitlines() == [f"class embeddings: {n} of 21 prompts" for n in (8, 16, 21)]
    monkeypatch.setattr(datasets, "SAY_EVERY", 1000)
    zeroshot.class_embeddings(Known(np.zeros((1, 2)), texts), names, templates, 8)
    assert capsys.readouterr().out == ""
