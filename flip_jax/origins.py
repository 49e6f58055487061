"""What a run starts from: its newest step, or another model. Imported only by runs that resume or have `init_from`."""

import logging
from typing import Any, NamedTuple

from etils import epath

from flip_jax import saved_config, saved_step, weights
from flip_jax.checkpoint import Checkpoints
from flip_jax.config import Config, Stage
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.train_step import Program, TrainState

_log = logging.getLogger(__name__)


class Origin(NamedTuple):
    """The step that a run starts from, and what of it the run takes before its model is built."""

    start: int  # the run's own step to resume from; 0: only the weights are taken
    step: epath.Path
    config: Config  # the run's, with the architecture of the step where that decides
    recorded: Config | None  # the settings that a resumed run was saved with
    tokenizer: Tokenizer | None

    def state(self, stage: Stage, program: Program, checkpoints: Checkpoints, batches: Any) -> TrainState:
        """Makes the first state of a run's first `stage`, and moves `batches` to where a resumed run left off."""
        if not self.start:
            started = weights.read_params(self.step, program.state.params, stage.config.model)
            _log.info("started from the weights in %s", self.step)
            state = program.init()
            return state._replace(params=state.params | started)
        if self.start == stage.first:
            from flip_jax import stages

            state = stages.restore(stage, program, self.step, checkpoints, batches)
        else:
            state = checkpoints.restore(program.state, batches)
        _log.info("resumed at step %d (%d samples)", self.start, stage.samples_seen(self.start))
        return state


def find(config: Config, checkpoints: Checkpoints) -> Origin:
    """Finds the newest step of a run, or else that of `init_from`.

    Raises:
      UserError: the settings or the weights do not fit the run.
    """
    start = checkpoints.latest() or 0
    step = checkpoints.directory / str(start) if start else saved_step.newest(config.init_from)
    # A text tower that starts from weights knows the ids of their tokenizer.
    tokenizer = saved_step.tokenizer(step) if start or not config.data.vocab else None
    if config.finetune.classes or config.init_model:
        config = weights.with_model_of(config, step)
    if not start:
        weights.check_start(config, step)
        return Origin(start, step, config, None, tokenizer)
    saved_config.check(step, config)
    return Origin(start, step, config, saved_config.read(step), tokenizer)
