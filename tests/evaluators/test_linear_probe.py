"""The linear probe against Newton's method in f64, and whole tasks with known features."""

import helpers
import jax
import numpy as np
import pytest
import scipy.special
from flax import nnx
from helpers import clusters, eval_config

from flip_jax import evaluators, sharding
from flip_jax.config import MeshConfig
from flip_jax.evaluators import linear_probe
from flip_jax.inference import Encoder
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError


def newton(x_NxD, label_N, classes, penalty, steps=30):
    """Fits multinomial logistic regression in f64: sum of cross-entropies + penalty / 2 |W|^2, free intercepts."""
    x_NxE = np.concatenate([x_NxD, np.ones((len(x_NxD), 1))], axis=1)
    n, e = x_NxE.shape
    target_NxC, weight_ExC = np.eye(classes)[label_N], np.zeros((e, classes))
    ridge = np.repeat(np.r_[np.full(e - 1, penalty), 0], classes)
    for _ in range(steps):
        p_NxC = scipy.special.softmax(x_NxE @ weight_ExC, axis=1)
        grad = (x_NxE.T @ (p_NxC - target_NxC)).ravel() + ridge * weight_ExC.ravel()
        curvature_NxCxC = p_NxC[:, :, None] * (np.eye(classes) - p_NxC[:, None])
        hessian = np.einsum("ne,nf,nij->eifj", x_NxE, x_NxE, curvature_NxCxC).reshape(e * classes, -1)
        # Adding a constant to all intercepts changes nothing; pinv picks the smallest solution.
        weight_ExC = weight_ExC - (np.linalg.pinv(hessian + np.diag(ridge)) @ grad).reshape(e, classes)
    return weight_ExC


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("devices", [1, 8])
def test_weights_match_newtons_method(monkeypatch, penalty, devices):
    monkeypatch.setattr(linear_probe, "BLOCK", 16)  # several blocks per device
    x, label = clusters(150)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        found = linear_probe.make_fit(linear_probe.place(mesh, x.astype(np.float32), label), 3, mesh)(penalty)
    expected = newton(x, label, 3, penalty)
    np.testing.assert_allclose(found[:-1], expected[:-1], atol=2e-3 * np.abs(expected).max())
    found, expected = (w[-1] - w[-1].mean() for w in (found, expected))
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_penalty_search_halves_its_steps_around_the_best():
    tried = []

    def accuracy(exponent):
        tried.append(exponent)
        return (-abs(exponent - 1.4),)

    assert linear_probe.best_exponent(accuracy) == 1.375
    assert tried[:7] == [-6, -4, -2, 0, 2, 4, 6] and len(tried) == len(set(tried)) == 15
    assert linear_probe.best_exponent(lambda exponent: (-exponent,)) == -6
    assert linear_probe.best_exponent(lambda exponent: (50.0, exponent)) == 6


def test_separable_features_give_100_percent_on_any_number_of_devices(task, monkeypatch):
    monkeypatch.setattr(linear_probe, "ITERATIONS", 30)
    x, label = clusters(90, noise=0.05)
    for devices in (1, 8):
        name, encoder = task((x[:60], label[:60]), (x[60:], label[60:]), devices)
        found = evaluators.evaluate(encoder, f"linear_probe/{name}", eval_config())
        assert list(found)[0] == "top1" and found["top1"] == found["mean_per_class"] == 100


def test_task_matches_a_computation_by_hand(task, monkeypatch):
    """Repeats search on the held-out fifth, fit to all and test accuracy in f64 by Newton's method."""
    monkeypatch.setattr(linear_probe, "EXPONENTS", (-2.0, 4.0))  # weaker ones take long to converge
    x, label = clusters(120, noise=1.5)
    train, test = (x[:80], label[:80]), (x[80:], label[80:])
    held = np.random.default_rng(0).permutation(80)[:16]
    seen = np.setdiff1d(np.arange(80), held)

    def accuracy(rows_and_labels, weight):
        x, label = rows_and_labels
        return 100 * np.mean(np.argmax(x @ weight[:-1] + weight[-1], axis=1) == label)

    results = [
        evaluators.evaluate(e, f"linear_probe/{n}", eval_config()) for n, e in (task(train, test, d) for d in (1, 8))
    ]
    assert results[0] == results[1]
    penalty = 10 ** results[0]["log10_penalty"]
    assert results[0]["top1"] == pytest.approx(accuracy(test, newton(*train, 3, penalty)))

    def held_out(exponent):
        return accuracy((x[held], label[held]), newton(x[seen], label[seen], 3, 10**exponent))

    best = max(map(held_out, np.arange(-2, 4.1, 0.5)))
    assert held_out(results[0]["log10_penalty"]) >= best - 100 / 16  # the search may miss the best by one image


def test_projected_features_are_the_embeddings():
    config = helpers.CONFIG
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        model = FLIP(config.model, nnx.Rngs(0))
        graphdef, params = nnx.split(model)
        image, _ = helpers.batch()
        found = Encoder(graphdef, params, None, config).features(image)
        embedded = np.asarray(model.encode_image(image))
    projected = found @ np.asarray(model.image_projection.kernel)
    np.testing.assert_allclose(projected / np.linalg.norm(projected, axis=1, keepdims=True), embedded, atol=1e-5)


@pytest.mark.parametrize("evaluator", ["linear_probe", "few_shot"])
def test_unusable_training_splits_are_refused(task, evaluator):
    x, label = clusters(30)
    name, encoder = task((x[:20], 0 * label[:20]), (x[20:], label[20:]))
    with pytest.raises(UserError, match="all 20 images of .* are of one class"):
        evaluators.evaluate(encoder, f"{evaluator}/{name}", eval_config())
    with pytest.raises(UserError, match="has no train split: add ';train=SOURCE'"):
        evaluators.find(f"{evaluator}/{name.partition(';')[0]}", eval_config())
    with pytest.raises(UserError, match="nowhere"):
        evaluators.find(f"{evaluator}/{name.partition(';')[0]};train=webdataset:/nowhere/*.tar", eval_config())


def test_the_search_makes_no_more_fits_than_its_progress_says():
    for best in np.arange(-6, 6.1, 1 / 8):
        asked = []

        def quality(exponent, asked=asked, best=best):
            asked.append(exponent)
            return (-abs(exponent - best),)

        linear_probe.best_exponent(quality)
        assert 7 < len(asked) + 1 <= linear_probe.FITS
