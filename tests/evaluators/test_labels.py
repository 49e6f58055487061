"""Labels of classifiers, probes and data sets without labels; what evaluations count."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from helpers import Features, Known, eval_config, picture, unit, write_samples

from flip_jax import evaluators, weights
from flip_jax.config import FinetuneConfig
from flip_jax.evaluators import datasets
from flip_jax.runtime import UserError

NAMES = ("ant", "bee", "cat")


def write_folders(root, labels):
    """Writes picture number i into the folder of its label; returns the source."""
    for i, name in labels.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{i}.png").write_bytes(picture(i))
    return f"folder:{root}"


class Classifier(Known):
    def __init__(self, scores, class_names):
        super().__init__(scores, {}, devices=1)
        self.class_names = class_names

    def encode_image(self, images, mask=""):
        return super().encode_image(images, mask)


def classify(source, class_names, scores, train="", **settings):
    config = dataclasses.replace(eval_config(**settings), finetune=FinetuneConfig(classes=scores.shape[1]))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=train))
    return evaluators.evaluate_and_count(Classifier(scores, class_names), f"classify/{source}", config)


def test_a_classifier_is_scored_by_the_names_it_was_trained_with(tmp_path):
    scores = np.eye(3)[[0, 2, 1]]  # picture 0 is an ant, 1 a cat, 2 a bee
    every = write_folders(tmp_path / "all", {0: "ant", 1: "cat", 2: "bee"})
    found, seen = classify(every, NAMES, scores)
    assert found["top1"] == 100 and seen == {"images": 3, "skipped": {}, "classes_without_images": []}
    without_bee = write_folders(tmp_path / "some", {0: "ant", 1: "cat"})
    (tmp_path / "some" / "cat" / "broken.png").write_bytes(b"x")
    found, seen = classify(without_bee, NAMES, scores)
    assert found["top1"] == 100
    assert seen == {"images": 2, "skipped": {"image does not decode": 1}, "classes_without_images": ["bee"]}
    other = write_folders(tmp_path / "other", {0: "ant", 1: "zebra", 2: "bee"})
    with pytest.raises(UserError, match="the classes that were trained: .*source: zebra. Missing in the source: cat."):
        classify(other, NAMES, scores)


def test_a_classifier_of_numbers_takes_numbers_or_a_file_of_names(tmp_path):
    scores = np.eye(3)
    write_samples(tmp_path / "0.tar", [{"png": picture(i), "cls": b"%d" % i} for i in range(3)])
    assert classify(f"webdataset:{tmp_path}/0.tar", (), scores)[0]["top1"] == 100
    assert classify(write_folders(tmp_path / "n", {0: "00", 2: "02"}), (), scores)[0]["top1"] == 100
    named = write_folders(tmp_path / "named", {0: "cat", 1: "ant", 2: "bee"})
    with pytest.raises(
        UserError, match="other classes than the classifier, which was trained on numbers: ant, bee, cat"
    ):
        classify(named, (), scores)
    (tmp_path / "names").write_text("cat\nant\nbee\n")
    assert classify(named, (), scores, classnames=str(tmp_path / "names"))[0]["top1"] == 100


def test_a_checkpoint_from_before_names_were_saved_keeps_its_order(tmp_path, caplog):
    labels = {i: str(i) for i in range(12)}
    place = sorted(labels.values())  # the order of that time
    scores = np.eye(12)[[place.index(name) for name in labels.values()]]
    source = write_folders(tmp_path / "x", labels)
    assert classify(source, None, scores, train=source)[0]["top1"] == 100
    assert "the checkpoint is from before class names were saved" in caplog.text
    with pytest.raises(UserError, match="other classes than the classifier"):
        classify(write_folders(tmp_path / "y", {0: "ant"}), None, scores, train=source)


def test_class_names_are_read_from_a_checkpoint(tmp_path):
    import orbax.checkpoint as ocp

    (tmp_path / "state").mkdir()
    assert weights.read_class_names(epath.Path(tmp_path)) is None
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "class_names", args=ocp.args.JsonSave(list(NAMES)))
    assert weights.read_class_names(epath.Path(tmp_path)) == NAMES


@pytest.mark.parametrize("evaluator", ["linear_probe", "few_shot"])
def test_probes_match_the_classes_of_both_splits_by_name(tmp_path, evaluator):
    label = np.arange(30) % 3
    features = np.eye(3)[label] + 0.01 * np.random.default_rng(0).normal(size=(30, 3))
    train = write_folders(tmp_path / "train", {i: NAMES[label[i]] for i in range(24)})
    rest = {i: NAMES[label[i]] for i in range(24, 30)}
    test = write_folders(tmp_path / "test", {i: name for i, name in rest.items() if name != "ant"})
    task = f"{evaluator}/{test};train={train}"
    found, seen = evaluators.evaluate_and_count(Features(features, 1), task, eval_config())
    assert next(iter(found.values())) == 100
    assert seen == {"images": 4, "skipped": {}, "classes_without_images": ["ant"]}
    other = write_folders(tmp_path / "other", rest | {29: "zebra"})
    with pytest.raises(UserError, match="other classes than the training split .* Only in the source: zebra"):
        evaluators.find(f"{evaluator}/{other};train={train}", eval_config())


def test_classes_of_another_data_set_are_counted_as_skipped(tmp_path):
    classes = ("cat", "dog", "airplane", "automobile", "bird", "deer", "frog", "horse", "ship", "truck")
    source = write_folders(tmp_path, dict(enumerate((*classes, "zebra"))))
    embedding = unit(np.random.default_rng(0).normal(size=(11, 8)))
    _, seen = evaluators.evaluate_and_count(Known(embedding, {}, 1), f"zeroshot/cifar10={source}", eval_config())
    assert seen == {"images": 10, "skipped": {datasets.OTHER_CLASS: 1}, "classes_without_images": []}


def test_file_of_names_gives_folders_their_class(tmp_path):
    source = write_folders(tmp_path / "x", {0: "n2", 1: "n1"})
    (tmp_path / "names.json").write_text(json.dumps({"n1": "owl", "n2": "fox"}))
    settings = eval_config(classnames=str(tmp_path / "names.json"))
    _, dataset = evaluators.find(f"zeroshot/{source}", settings)
    (batch,) = datasets.labelled(dataset, settings)
    found = {
        int(i): dataset.classes[c] for i, c in zip(batch["image"][:, 0, 0, 0], batch["label"], strict=True) if c >= 0
    }
    assert found == {0: "fox", 1: "owl"}


def test_tfds_label_below_zero_and_missing_features_are_no_classes(monkeypatch):
    from flip_jax.data import indexed

    rows = [{"image": [picture(0)], "label": [-1]}, {"image": [picture(1)], "label": []}, {"label": [1]}]
    source = object.__new__(indexed.Tfds)
    source.class_names, source._label, source._counts, source._text, source._image = (
        ["a", "b"],
        "label",
        False,
        None,
        "image",
    )
    source._rows = type("Rows", (), {"__getitems__": lambda self, numbers: numbers})()
    monkeypatch.setattr(indexed, "example", lambda number: rows[number])
    found = [record for record, _ in source.read([(i, 0) for i in range(3)])]
    assert [r.get("bad") or (r["label"], r["texts"]) for r in found] == [(-1, []), (None, []), "no image"]


def test_an_image_without_label_is_refused(tmp_path):
    write_samples(tmp_path / "0.tar", [{"png": picture(0)}])
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match="has no label; the test splits of some data sets have -1"):
        evaluators.evaluate(Known(np.eye(2), {}, 1), f"zeroshot/webdataset:{tmp_path}/0.tar", eval_config())
