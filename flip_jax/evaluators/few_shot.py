"""Few-shot classification: ridge regression on the frozen features of a few training images per class.

As in big_vision: features are standardised, targets are 1 for the image's class and -1 for the others, the weights have
a closed form, and several random draws of the images show the spread.
"""

from collections.abc import Iterator

import jax
import numpy as np
import scipy.linalg

from flip_jax.config import Config
from flip_jax.evaluators import datasets, linear_probe, needs, zeroshot
from flip_jax.evaluators.datasets import Dataset
from flip_jax.inference import Encoder
from flip_jax.runtime import say

NEEDS = (needs.labels, needs.train_split)

SHOTS = (16, 8, 4, 2, 1)  # training images per class; the first is the headline
SEEDS = range(3)
PENALTY = 2.0**10  # big_vision's; for standardised features


def draw(label_N: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Returns the indices of `shots` random rows per class, or all rows of a smaller class.

    With the same seed more shots include the rows of fewer shots.
    """
    order = np.random.default_rng(seed).permutation(len(label_N))
    order = order[np.argsort(label_N[order], kind="stable")]
    label = label_N[order]
    return np.sort(order[np.arange(len(order)) - np.searchsorted(label, label) < shots])


def fit(x_NxD: np.ndarray, label_N: np.ndarray, classes: int) -> np.ndarray:
    """Fits ridge regression in f64 and returns weights f32 [width + 1, classes].

    The last row is the intercept, which is not penalised.
    """
    x_NxD = x_NxD.astype(np.float64)
    mean, std = x_NxD.mean(axis=0), x_NxD.std(axis=0) + 1e-5
    x_NxD = (x_NxD - mean) / std
    target_NxC = 2.0 * (label_N[:, None] == np.arange(classes)) - 1
    # Standardised features have mean 0, so the intercept is the mean of the targets.
    middle = target_NxC.mean(axis=0)
    gram = x_NxD.T @ x_NxD + PENALTY * np.eye(x_NxD.shape[1])
    weight_DxC = scipy.linalg.solve(gram, x_NxD.T @ (target_NxC - middle), assume_a="pos") / std[:, None]
    return np.concatenate([weight_DxC, (middle - mean @ weight_DxC)[None]]).astype(np.float32)


def run(encoder: Encoder, dataset: Dataset, config: Config) -> Iterator[tuple[str, float]]:
    """Yields the mean and the standard deviation of the data set's metric over the seeds, for each number of shots."""
    (x_NxD, label_N), test_split, classes = linear_probe.both_splits(encoder, dataset, config)
    parts, name = [], datasets.shortened(dataset.name)
    fits = datasets.Progress(f"{name}: few-shot", len(SHOTS) * len(SEEDS), " fits")
    with jax.set_mesh(encoder.mesh), fits as bar:
        test_rows = linear_probe.place(encoder.mesh, *test_split)
        for shots in SHOTS:
            values = []
            for seed in SEEDS:
                rows = draw(label_N, shots, seed)
                hits = linear_probe.count(fit(x_NxD[rows], label_N[rows], classes), test_rows, encoder.mesh)
                values.append(zeroshot.accuracies(hits)[dataset.metric])
                bar.update()
            yield f"{shots}shot", float(np.mean(values))
            yield f"{shots}shot_std", float(np.std(values, ddof=1))
            parts.append(f"{shots} shots {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}")
    say(f"{name}: {dataset.metric} (%) of {', '.join(parts)}")
