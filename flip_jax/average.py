"""The running average of a run's weights, `config.optim.ema`, which evaluation and export take in their place."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class AveragedState(NamedTuple):
    """`train_step.TrainState` with the average, laid out as the weights are."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def keep(
    decay: float, init: Callable, step: Callable, abstract: Any, shardings: Any
) -> tuple[Callable, Callable, AveragedState, AveragedState]:
    """Adds the average to a run's functions, its abstract state and the shardings of that.

    The weights of t updates ago count in proportion to decay**t. Their shares add up to 1 from the first update on,
    which is Adam's bias correction, so those that the run started from have none.
    """

    def averaged_init(*params):
        state = init(*params)
        return AveragedState(state.step, state.params, state.opt_state, jax.tree.map(jnp.zeros_like, state.params))

    def averaged_step(state, image, target):
        updated, report = step(state, image, target)
        log = math.log(decay)
        share = jnp.expm1(log) / jnp.expm1(log * updated.step)  # (1 - decay) / (1 - decay**updates), without cancelling
        share = jnp.where(updated.step == 1, 1, share)  # without rounding, so that a frozen tower's average is its own
        ema = jax.tree.map(lambda average, value: average + share * (value - average), state.ema, updated.params)
        return AveragedState(updated.step, updated.params, updated.opt_state, ema), report

    states = (AveragedState(state.step, state.params, state.opt_state, state.params) for state in (abstract, shardings))
    return averaged_init, averaged_step, *states
