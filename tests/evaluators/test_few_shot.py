"""Few-shot ridge regression against its dual form, step by step and as a whole task."""

import numpy as np
import pytest
from helpers import clusters, eval_config

from flip_jax import evaluators
from flip_jax.evaluators import datasets, few_shot


def dual(x_NxD, label_N, classes, new_MxD, bias=1e4):
    """Computes scores by the dual form of ridge regression, with the intercept as a barely penalised feature."""
    mean, std = x_NxD.mean(axis=0), x_NxD.std(axis=0) + 1e-5
    x, new = ((np.concatenate([(a - mean) / std, np.full((len(a), 1), bias)], axis=1)) for a in (x_NxD, new_MxD))
    target = np.where(label_N[:, None] == np.arange(classes), 1.0, -1.0)
    return new @ x.T @ np.linalg.solve(x @ x.T + few_shot.PENALTY * np.eye(len(x)), target)


@pytest.mark.parametrize("rows, width", [(30, 8), (9, 20)])
def test_weights_match_the_dual_form(rows, width):
    x, label = clusters(rows, width)
    new, _ = clusters(10, width, seed=1)
    weight_ExC = few_shot.fit(x, label, 3)
    found, expected = new @ weight_ExC[:-1] + weight_ExC[-1], dual(x, label, 3, new)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_draws_are_balanced_and_nested():
    label = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 20, 3]))
    four, eight = (few_shot.draw(label, shots, 0) for shots in (4, 8))
    assert np.bincount(label[four]).tolist() == [4, 4, 3] and np.bincount(label[eight]).tolist() == [8, 8, 3]
    assert set(four) <= set(eight) and len(set(four)) == 11
    assert set(four) != set(few_shot.draw(label, 4, 1))


def test_task_matches_a_computation_by_hand(task):
    x, label = clusters(160, noise=1.5)
    train, test = (x[:100], label[:100]), (x[100:], label[100:])
    results = [
        evaluators.evaluate(e, f"few_shot/{n}", eval_config()) for n, e in (task(train, test, d) for d in (1, 8))
    ]
    assert results[0] == results[1]
    assert list(results[0]) == [f"{k}shot{end}" for k in (16, 8, 4, 2, 1) for end in ("", "_std")]
    for shots in few_shot.SHOTS:
        accuracies = []
        for seed in few_shot.SEEDS:
            rows = few_shot.draw(train[1], shots, seed)
            score = dual(x[rows].astype(np.float32).astype(float), label[rows], 3, test[0])
            accuracies.append(100 * np.mean(score.argmax(axis=1) == test[1]))
        assert results[0][f"{shots}shot"] == pytest.approx(np.mean(accuracies)), shots
        assert results[0][f"{shots}shot_std"] == pytest.approx(np.std(accuracies, ddof=1)), shots


def test_separable_features_give_100_percent_in_every_draw(task, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "SAY_EVERY", 0)
    x, label = clusters(90, noise=0.01)
    name, encoder = task((x[:60], label[:60]), (x[60:], label[60:]))
    found = evaluators.evaluate(encoder, f"few_shot/{name}", eval_config())
    assert all(value == (0 if metric.endswith("_std") else 100) for metric, value in found.items())
    said = capsys.readouterr().out
    for done in range(1, 16):
        assert f"{datasets.shortened(name)}: few-shot: {done} of 15 fits\n" in said
