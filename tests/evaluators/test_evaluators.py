"""Evaluation: tasks, data sets and labels, and accuracies whose true values are known from the embeddings."""

import io
import json
import re

import numpy as np
import pytest
from etils import epath
from helpers import REPO, SIZE, Known, eval_config, picture, unit, write_samples

from flip_jax import evaluators
from flip_jax.evaluators import datasets


@pytest.fixture
def classified(tmp_path):
    """37 pictures of 7 classes in CLIP_benchmark's layout, embeddings, and the class embeddings."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 37)  # the last class has no picture
    write_samples(tmp_path / "test" / "0.tar", [{"png": picture(i), "cls": b"%d" % y} for i, y in enumerate(labels)])
    (tmp_path / "classnames.txt").write_text("".join(f"class {c}\n" for c in range(7)))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}\n")
    return f"webdataset:{tmp_path}/test/*.tar", labels, unit(rng.normal(size=(37, 8))), unit(rng.normal(size=(7, 8)))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [16, 40])
def test_accuracies_are_those_of_numpy_whatever_the_batch_and_the_devices(classified, devices, batch_size):
    source, labels, image_NxE, class_CxE = classified
    encoder = Known(image_NxE, {f"class {c}": class_CxE[c] for c in range(7)}, devices)
    settings = eval_config(f"zeroshot/{source}", batch_size=batch_size)
    found = dict(evaluators.run(encoder, settings))
    rank = np.argsort(np.argsort(-(image_NxE @ class_CxE.T), axis=1), axis=1)[np.arange(37), labels]
    per_class = [100 * np.mean(rank[labels == c] == 0) for c in range(6)]
    expected = {"top1": 100 * np.mean(rank == 0), "top5": 100 * np.mean(rank < 5), "mean_per_class": np.mean(per_class)}
    assert found.pop("zeroshot/mean") == pytest.approx(expected["top1"])
    assert found == pytest.approx({f"zeroshot/{source}/{name}": value for name, value in expected.items()})


def test_a_model_that_gives_no_numbers_finds_nothing(classified):
    source, _, image_NxE, _ = classified
    encoder = Known(np.full_like(image_NxE, np.nan), {f"class {c}": np.full(8, np.nan) for c in range(7)})
    assert set(dict(evaluators.run(encoder, eval_config(f"zeroshot/{source}"))).values()) == {0.0}


def labels_of(task, settings):
    """The labels and masks of all rows of a task's data set."""
    _, dataset = evaluators.find(task, settings)
    batches = list(datasets.labelled(dataset, settings))
    return dataset, np.concatenate([b["label"] for b in batches]), np.concatenate([b["mask"] for b in batches])


def write_folders(root, names, pictures=1):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(pictures):
            (root / name / f"{j}.PNG").write_bytes(picture(i))
        (root / name / "notes.txt").write_text("no picture")
    return root


def test_a_folder_for_each_class(tmp_path):
    write_folders(tmp_path, ["red_fox", "owl"], pictures=3)
    dataset, label, mask = labels_of(f"zeroshot/folder:{tmp_path}", eval_config(batch_size=8))
    assert dataset.classes == ("owl", "red fox") and dataset.templates == ("a photo of a {}.",)
    assert label[mask].tolist() == [0, 0, 0, 1, 1, 1] and mask.sum() == 6


def test_classes_are_found_by_their_names_and_others_left_out(tmp_path):
    """ImageNet-A has 200 of ImageNet's classes, which folders and TFDS call by their WordNet numbers."""
    classes, wnids = datasets.recorded_classes("imagenet_a")
    assert len(classes) == len(wnids) == 200
    folders = [*wnids[::-1], "n01440764"]  # a tench, which is not of ImageNet-A
    write_folders(tmp_path, folders)
    dataset, label, mask = labels_of(f"zeroshot/imagenet_a=folder:{tmp_path}", eval_config(batch_size=64))
    names = sorted(folders)
    expected = [wnids.index(name) if name in wnids else -1 for name in names]
    assert label[: len(names)].tolist() == expected and mask.sum() == 200
    assert dataset.classes[wnids.index("n01498041")] == "stingray" and len(dataset.templates) == 7
    assert len(evaluators.find(f"zeroshot/imagenet_a_80=folder:{tmp_path}", eval_config())[1].templates) == 80


def test_folders_without_any_name_of_a_class_go_by_their_order(tmp_path):
    write_folders(tmp_path, [f"{i:05}" for i in range(43)])  # as GTSRB's
    _, label, mask = labels_of(f"zeroshot/gtsrb=folder:{tmp_path}", eval_config(batch_size=64))
    assert label[mask].tolist() == list(range(43))


def test_tars_of_another_order_go_by_their_names(tmp_path):
    names = ["ship", "truck", "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse"]
    write_samples(tmp_path / "test" / "0.tar", [{"png": picture(0), "cls": b"%d" % i} for i in range(10)])
    (tmp_path / "classnames.txt").write_text("\n".join(names))
    dataset, label, mask = labels_of(f"zeroshot/cifar10=webdataset:{tmp_path}/test/*.tar", eval_config())
    assert [dataset.classes[i] for i in label[mask]] == names and len(dataset.templates) == 18


@pytest.mark.parametrize(
    "names, message",
    [
        (["airplane", "bird", "house"], r"has other classes than cifar10: 3 \(airplane, bird, house ...\), wanted 10"),
        ([f"class {i}" for i in range(9)], "has other classes than cifar10: 9 .* wanted 10"),
    ],
)
def test_a_source_of_other_classes_is_refused(tmp_path, names, message):
    write_folders(tmp_path, names)
    with pytest.raises(ValueError, match=message):
        labels_of(f"zeroshot/cifar10=folder:{tmp_path}", eval_config())


@pytest.mark.parametrize(
    "samples, message",
    [
        (
            [{"cls": b"0"}, {"cls": b"7"}, {"cls": b"8"}],
            "2 of 3 pictures of a batch: the first, 0.tar/s00001, has label 7, outside",
        ),
        ([{"cls": b"0"}, {"txt": b"a"}], "1 of 2 pictures of a batch: the first, 0.tar/s00001, has no label"),
        ([{"cls": b"0", "png": b"no picture"}], "none of the 1 pictures of .* can be used"),
    ],
)
def test_labels_outside_the_classes_and_empty_splits_are_refused(classified, tmp_path, samples, message):
    source, _, image_NxE, _ = classified
    write_samples(tmp_path / "test" / "0.tar", [{"png": picture(0)} | parts for parts in samples])
    with pytest.raises(ValueError, match=message):
        dict(evaluators.run(Known(image_NxE, {}), eval_config(f"zeroshot/{source}")))


def test_names_that_differ_in_punctuation_alone(tmp_path):
    """As those of emoji: keycaps of # and *."""
    write_folders(tmp_path, ["keycap #", "keycap *", "owl"])
    _, label, mask = labels_of(f"zeroshot/emoji=folder:{tmp_path}", eval_config())
    assert label[mask].tolist() == [0, 1, 2]


def test_names_of_a_file_replace_those_of_the_source(tmp_path):
    write_folders(tmp_path / "x", ["n1", "n2", "owl"])
    for text, count in (("owl\nfox\ndog", 3), ("owl\nfox", 2)):
        (tmp_path / "names.txt").write_text(text)
        settings = eval_config(classnames=str(tmp_path / "names.txt"), batch_size=8 * count)
        if count == 3:
            dataset, label, mask = labels_of(f"zeroshot/folder:{tmp_path}/x", settings)
            assert dataset.classes == ("owl", "fox", "dog") and label[mask].tolist() == [0, 1, 2]
        else:
            with pytest.raises(ValueError, match="has other classes than .*: 3 .* wanted 2"):
                labels_of(f"zeroshot/folder:{tmp_path}/x", settings)


def test_the_table_of_the_docs_is_that_of_the_code():
    assert datasets.listing() in (REPO / "docs" / "evaluation.md").read_text()


def test_prompts_without_a_place_for_the_name_are_refused(classified, tmp_path):
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na photo\n")
    with pytest.raises(ValueError, match="each prompt needs one {} for the class name, got 'a photo'"):
        evaluators.find(f"zeroshot/webdataset:{tmp_path}/test/*.tar", eval_config(batch_size=56))


def test_class_names_of_a_file(classified, tmp_path):
    source = f"webdataset:{tmp_path}/test/*.tar"
    (tmp_path / "classnames.txt").unlink()
    with pytest.raises(ValueError, match="has no class names of its own: config.eval.classnames must be a file"):
        evaluators.find(f"zeroshot/{source}", eval_config(batch_size=24))
    for file, text in {"lines.txt": "red fox\nowl\n", "list.json": json.dumps(["red fox", "owl"])}.items():
        (tmp_path / file).write_text(text)
        _, dataset = evaluators.find(f"zeroshot/{source}", eval_config(classnames=str(tmp_path / file)))
        assert dataset.classes == ("red fox", "owl")
    (tmp_path / "twice.txt").write_text("owl\nfox\nowl\nfox\nowl\n")
    with pytest.raises(ValueError, match="3 of the 5 class names are repeated, first 'owl'"):
        evaluators.find(f"zeroshot/{source}", eval_config(classnames=str(tmp_path / "twice.txt")))
    with pytest.raises(ValueError, match="config.eval.classnames must be a file .* got '/nowhere'"):
        evaluators.find(f"zeroshot/{source}", eval_config(classnames="/nowhere"))


@pytest.mark.parametrize(
    "task, message",
    [
        ("zeroshoot/cifar10", "'zeroshoot/cifar10' must be EVALUATOR/DATASET with EVALUATOR one of zeroshot, "),
        ("zeroshot", "'zeroshot' must be EVALUATOR/DATASET"),
        ("zeroshot/cifar", "zeroshot/cifar: there is no data set 'cifar'; known are cifar10, cifar100, cars"),
        ("zeroshot/imagenet-a", "no data set 'imagenet-a'; known are imagenet_a, "),
        ("zeroshot/cifr10=folder:/x", "no data set 'cifr10'; known are cifar10, "),
        ("zeroshot/foldr:/x", 'source must be "KIND:REST" with KIND one of webdataset, '),
        ("zeroshot/coco", "zeroshot/coco: .*coco/dataset_coco.json.* Put Karpathy's dataset_coco.json"),
        ("zeroshot/cifar10", r"`tfds build cifar10 --file_format=array_record --data_dir=\S+/none`"),
        ("zeroshot/gtsrb", r"clip_benchmark_export_wds --dataset gtsrb --split test .* --output \S+/none/gtsrb`"),
        ("zeroshot/ucf101;train=folder:/x", "zeroshot/ucf101;.*/none/ucf101/test is no folder"),
        ("zeroshot/ucf101", r"/none/ucf101/test is no folder.* Put pictures there, in a folder for each class"),
    ],
)
def test_what_is_unknown_or_not_there_is_named_with_its_remedy(tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        evaluators.find(task, eval_config(tfds_dir=tmp_path / "none"))


def test_all_known_sets_have_names_prompts_and_a_metric():
    templates = datasets.recorded_templates()
    without_names = {"emoji", "objectnet", "objectnet_80", "coco", "flickr30k"}
    for name, known in datasets.KNOWN.items():
        classes, labels = datasets.recorded_classes(known.classes or name)
        index_named = name.startswith(("dsprites", "smallnorb"))  # their class names are numbers, TFDS's
        assert bool(classes) != (name in without_names or index_named), name
        assert not labels or len(labels) == len(classes) == len(set(labels)), name
        assert labels or len(classes) == len(set(classes)), name
        assert known.metric in ("top1", "mean_per_class", datasets.CAPTIONS), name
        if known.metric != datasets.CAPTIONS:
            assert all(prompt.count("{}") == 1 for prompt in templates[known.templates or name]), name
    sizes = {"imagenet": 1000, "imagenet_r": 200, "sun397": 397, "cars": 196, "aircraft": 100, "ucf101": 101}
    assert {name: len(datasets.recorded_classes(name)[0]) for name in sizes} == sizes
    assert sum(known.test.startswith("tfds:") for known in datasets.KNOWN.values()) >= 25


def test_what_tfds_calls_its_classes_is_what_is_recorded(tmp_path):
    """As far as TFDS knows before it has downloaded a set."""
    tfds, checked = pytest.importorskip("tensorflow_datasets"), []
    for name, known in datasets.KNOWN.items():
        if not known.test.startswith("tfds:") or name.startswith(("emoji", "clevr", "dsprites", "smallnorb")):
            continue
        builder = re.match("tfds:(.+)/", known.test)[1]
        names = tfds.builder(builder, data_dir=tmp_path).info.features["label"].names
        classes, labels = datasets.recorded_classes(known.classes or name)
        dataset = datasets.Dataset(name, known.test, classes=classes, labels=labels)
        places = datasets.places(known.test, names, dataset)
        assert sorted(places[places >= 0]) == list(range(len(classes))), name
        if labels and names[1] != "1":
            assert [names[i] for i in np.argsort(places)[-len(classes) :]] == list(labels), name
            checked.append(name)
    assert len(checked) >= 15, checked


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS set of CIFAR-10's classes in the opposite order, with 3 to 10 objects in each picture."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder, names = tmp_path_factory.mktemp("tfds"), list(datasets.recorded_classes("cifar10")[0][::-1])

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


def test_a_tfds_set_by_its_label_another_feature_or_a_count(tfds_dir):
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
    with pytest.raises(ValueError, match="has no label 'nonesuch'; its features are .*angle"):
        labels("tfds:tiny_things/train#nonesuch")


def test_the_training_split_of_a_set(tfds_dir):
    settings = eval_config(tfds_dir=tfds_dir)
    _, dataset = evaluators.find("zeroshot/cifar10=tfds:tiny_things/validation;train=tfds:tiny_things/train", settings)
    assert sum(batch["mask"].sum() for batch in datasets.labelled(dataset, settings, "train")) == 20
    _, dataset = evaluators.find("zeroshot/cifar10=tfds:tiny_things/validation", settings)
    with pytest.raises(ValueError, match="cifar10 has no train split: add ';train=SOURCE' to the task"):
        next(datasets.labelled(dataset, settings, "train"))
