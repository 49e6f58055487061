"""Evaluators: one file each, `run(encoder, source, config)` yields (metric name, value).

An entry of `EVALUATORS` runs where `config.eval` names a source for it.
"""

from collections.abc import Iterator

from flip_jax.config import Config
from flip_jax.evaluators import zeroshot
from flip_jax.inference import Encoder

EVALUATORS = {"zeroshot": zeroshot}


def check(config: Config) -> None:
    """Raises ValueError for a source that cannot be evaluated, before time is spent on training."""
    for name, evaluator in EVALUATORS.items():
        if config.eval.every_steps and (source := getattr(config.eval, name)):
            evaluator.check(source, config)


def run(encoder: Encoder, config: Config) -> Iterator[tuple[str, float]]:
    """The metrics of every evaluator that has a source."""
    for name, evaluator in EVALUATORS.items():
        if source := getattr(config.eval, name):
            yield from evaluator.run(encoder, source, config)
