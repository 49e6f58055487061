"""Evaluations of a run in training."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from flip_jax import evaluators, inference, metrics, runtime
from flip_jax.config import Stage
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.evaluators import snapshot
from flip_jax.train_step import Program


def evaluation(
    stage: Stage,
    program: Program,
    tokenizer: Tokenizer | None,
    class_names: tuple[str, ...],
    mesh: Mesh,
    writer: metrics.Writer,
    termination: runtime.Termination,
) -> Callable[[Any, dict[str, Any], int], None]:
    """Builds the function (params, batch, step) that evaluates weights and writes the results.

    It returns early, without results, where the run is to stop.
    """
    config = stage.config
    encoder: inference.Encoder | None = None
    look = snapshot.Snapshot(program.graphdef, config, mesh)

    def evaluate(params, batch, step):
        nonlocal encoder
        # Later encoders share the programs that the first one compiles.
        if encoder:
            encoder = encoder.with_params(params)
        else:
            encoder = inference.Encoder(program.graphdef, params, tokenizer, config, class_names)
            for name in ("_image", "_text", "_features"):
                setattr(encoder, name, _unless_stopping(getattr(encoder, name), termination))
        try:
            results = dict(evaluators.run(encoder, config))
        except _Stopping:
            runtime.say(f"step {step} is not evaluated, because the run stops: flip evaluate does it")
            return
        writer.write(step, {"samples_seen": stage.samples_seen(step), **results})
        if "text" in batch and (writer.trackers or jax.process_count() > 1):  # all take part, the first one writes
            writer.draw(step, *look(params, batch, step))

    return evaluate


class _Stopping(Exception):
    """Raised within an evaluation where the run is to stop."""


def _unless_stopping(encode, termination):
    def checked(*arguments, **settings):
        if termination.reached():
            raise _Stopping
        return encode(*arguments, **settings)

    return checked
