"""Fixtures for the tests of the evaluators."""

import numpy as np
import pytest
from helpers import Features, picture, write_samples


@pytest.fixture
def task(tmp_path):
    """Returns a function that writes a training and a test split of given (features, labels).

    It returns the task's data set, "SOURCE;train=SOURCE", and an encoder that gives each image its features.
    """

    def build(train, test, devices=8):
        (x, label), (test_x, test_label) = train, test
        numbers = iter(range(len(x) + len(test_x)))
        for split, labels in (("train", label), ("test", test_label)):
            samples = [{"png": picture(next(numbers)), "cls": b"%d" % y} for y in labels]
            write_samples(tmp_path / split / "0.tar", samples)
        name = f"webdataset:{tmp_path}/test/*.tar;train=webdataset:{tmp_path}/train/*.tar"
        return name, Features(np.concatenate([x, test_x]), devices)

    return build
