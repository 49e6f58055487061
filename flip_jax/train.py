"""The loop around the train step."""

import collections
import contextlib
import json
import logging
import os
import signal
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flip_jax import checkpoint, evaluators, metrics, sharding, train_step
from flip_jax.config import Config
from flip_jax.data import pipeline
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.evaluators import snapshot
from flip_jax.inference import Encoder

_log = logging.getLogger(__name__)

IN_FLIGHT = 2  # steps given to the devices ahead of the one they work on


def train(config: Config, workdir: str | os.PathLike, started: float | None = None) -> None:
    """Trains to `config.total_samples`, or goes on from the newest checkpoint in `workdir`.

    The time to the first step is counted from `started`, a value of `time.perf_counter`, or else from now.

    Raises:
      ValueError: settings, data or checkpoints that do not fit together, each with its remedy.
      FloatingPointError: a loss that is not finite; the step and the keys of its samples are named.
    """
    started = time.perf_counter() if started is None else started
    workdir = epath.Path(workdir)
    if config.profile and "://" in os.fspath(workdir):
        raise ValueError(f"config.profile cannot write to {workdir}; profile a few steps with a --workdir on a disk")
    mesh = sharding.make_mesh(config.mesh)
    check_batches(config, mesh)
    evaluators.check(config)
    metrics.check(config)
    with (
        contextlib.closing(checkpoint.Checkpoints(workdir, config.checkpoint.keep)) as checkpoints,
        jax.set_mesh(mesh),
        _Termination() as termination,
    ):
        _run(config, workdir, mesh, checkpoints, termination, started)


def _run(
    config: Config,
    workdir: epath.Path,
    mesh: Mesh,
    checkpoints: checkpoint.Checkpoints,
    termination: "_Termination",
    started: float,
) -> None:
    start = checkpoints.latest() or 0
    if start:
        checkpoints.check_config(config)
    if start == config.total_steps:
        _log.info("%s: this run is finished, all %d steps are done; nothing to do", workdir, start)
        return
    tokenizer = make_tokenizer(config, checkpoints)
    batches = iter(
        pipeline.train_dataset(config, tokenizer, process_index=jax.process_index(), process_count=jax.process_count())
    )
    before = time.perf_counter()
    remat, program, peak = train_step.least_recompute(config, mesh, _memory())
    _say(f"compiled in {time.perf_counter() - before:.0f} s: remat {remat}, {peak / 2**30:.2f} GiB on each device")
    # Some processes may have found the program in their cache; collectives of CPUs wait no longer than 30 s.
    _meet("compiled")
    encoder = Encoder(program.graphdef, None, tokenizer, config)
    # Order of initialisation: resume, else init_from, else fresh.
    if start:
        state = checkpoints.restore(program.state, batches)
        _log.info("resumed at step %d (%d samples)", start, start * config.global_batch_size)
    else:
        state = program.init()
        if config.init_from:
            step = checkpoint.newest(config.init_from)
            wanted = {name: part for name, part in program.state.params.items() if name != "head"}  # which is new
            state = state._replace(params=state.params | checkpoint.read_params(step, wanted, config.model))
            _log.info("started from the weights in %s", step)
    flops = metrics.flops_per_sample(config.model, config.finetune.classes)
    _log_start(config, mesh, program, flops)
    writer = metrics.Writer(workdir, start, config)
    metrics.write_parameters(workdir, program.state.params)
    look = snapshot.Snapshot(program.graphdef, config, mesh)
    progress = metrics.Progress(flops, config.global_batch_size, start, config.total_steps)
    window: list[tuple[int, list[str], dict[str, jax.Array]]] = []  # steps since the last log point
    waited = 0.0
    # Of a run that goes on from within them, the steps to profile are over.
    first_traced, last_traced = config.profile if config.profile and start < config.profile[0] else (0, 0)
    for step in range(start + 1, config.total_steps + 1):
        if step == first_traced:
            jax.profiler.start_trace(workdir / "profile" / f"process_{jax.process_index()}")
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            arrays = tuple(sharding.to_devices(mesh, *(batch[name] for name in program.inputs)))
            with jax.transfer_guard("disallow"):
                state, report = program.step(state, *arrays)
        if step == start + 1:
            jax.block_until_ready(state)
            _say(f"first step done {time.perf_counter() - started:.1f} s after the start of the program")
        if step == last_traced:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        window.append((step, batch["keys"], report))
        if jax.default_backend() == "cpu":
            # Collectives of two programs that are on CPUs at once can wait for each other for ever.
            jax.block_until_ready((state, report))
        elif len(window) > IN_FLIGHT:
            # Bounds the batches that wait on the devices; the step waited for is done long before they run dry.
            jax.block_until_ready(window[-1 - IN_FLIGHT][2])
        stop, last = termination.reached(step), step == config.total_steps
        save = stop or last or _due(step, config.checkpoint.every_steps)
        evaluate = config.eval.every_steps and (last or _due(step, config.eval.every_steps))
        if save or evaluate or _due(step, config.log.every_steps):
            scalars = summarise(window, workdir)
            scalars |= {"samples_seen": step * config.global_batch_size, **progress.report(step)}
            scalars["input_wait_seconds"], waited = waited, 0.0
            scalars |= _count_scalars(step, batch["counts"])
            window.clear()
            writer.write(step, scalars)
            _say(metrics.progress_line(step, config.total_steps, scalars))
        before = time.perf_counter()
        if evaluate:
            encoder.params = state.params
            results = dict(evaluators.run(encoder, config))
            writer.write(step, {"samples_seen": step * config.global_batch_size, **results})
            if "text" in batch and (writer.trackers or jax.process_count() > 1):  # all take part, the first one writes
                writer.draw(step, *look(state.params, batch, step))
        if save:
            checkpoints.save(step, state, batches, tokenizer, config)
        progress.exclude(time.perf_counter() - before)
        if stop:
            break
    writer.close()
    if stop and not last:
        checkpoints.wait()
        _say(f"SIGTERM: saved step {step} of {config.total_steps} in {workdir}; run the same command to go on")


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises ValueError where the training or evaluation batch cannot be split evenly over the mesh."""
    shards = sharding.batch_shards(mesh)
    sizes = {"global_batch_size": (config.global_batch_size, config.microbatches)}
    if config.eval.every_steps:
        sizes["eval.batch_size"] = (config.eval.batch_size, 1)
    for key, (size, microbatches) in sizes.items():
        parts = shards * microbatches
        if size % parts:
            times = f" times {microbatches} microbatches" if microbatches > 1 else ""
            raise ValueError(
                f"config.{key} {size} does not divide by the {shards} devices that the batch is split over "
                f"(mesh data x fsdp){times}; the nearest that does is {max(1, round(size / parts)) * parts}"
            )


def make_tokenizer(config: Config, checkpoints: checkpoint.Checkpoints) -> Tokenizer | None:
    """The tokenizer of the run: the checkpoint's, else `config.data.vocab`'s, else one trained on the captions.

    None where a classifier is trained, which reads no text.

    Raises:
      ValueError: it has more entries than `config.model.text.vocab_size`.
    """
    if config.finetune.classes:
        return None
    size = config.model.text.vocab_size
    if checkpoints.latest() is not None:
        tokenizer = Tokenizer.from_json(checkpoints.read("tokenizer"))
    elif config.data.vocab:
        tokenizer = Tokenizer.from_vocab(config.data.vocab)
    else:
        _log.info("config.data.vocab is empty: training a WordPiece of at most %d entries on the captions", size)
        tokenizer = Tokenizer.train(pipeline.caption_sample(config), size)
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"config.model.text.vocab_size {size} is less than the tokenizer's {tokenizer.vocab_size} entries "
            f"({config.data.vocab}); raise it to at least {tokenizer.vocab_size}"
        )
    return tokenizer


def summarise(window: list[tuple[int, list[str], dict[str, jax.Array]]], workdir: epath.Path) -> dict[str, float]:
    """Fetches the reports of the steps since the last log point: the mean loss, the other scalars of the last step.

    Raises:
      FloatingPointError: a loss is not finite. The samples' keys (of this process) go to WORKDIR/nonfinite_STEP.txt.
    """
    reports = jax.device_get([report for _, _, report in window])
    for (step, keys, _), report in zip(window, reports, strict=True):
        if not np.isfinite(report["loss"]):
            path = workdir / f"nonfinite_{step}.txt"
            path.write_text("\n".join(keys) + "\n")
            raise FloatingPointError(
                f"the loss of step {step} is {report['loss']}; nothing was saved since. Its samples: {keys[:4]} ... "
                f"(all in {path}). Look at them, lower config.optim.base_learning_rate or raise config.warmup_samples."
            )
    scalars = {name: float(value) for name, value in reports[-1].items()}
    return scalars | {"loss": float(np.mean([report["loss"] for report in reports]))}


class _Termination:
    """Notices SIGTERM without interrupting a step; with several processes, all stop after the same step."""

    def __enter__(self):
        self._signalled = False
        # With several processes jax.distributed has its own handler, which a second one would replace.
        self._previous = signal.signal(signal.SIGTERM, self._notice) if jax.process_count() == 1 else None
        return self

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, *_):
        self._signalled = True

    def reached(self, step: int) -> bool:
        """Whether the run ends after this step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled


def _memory() -> int | None:
    """Bytes that every device of the run has, or None where that is not known (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    least = int(np.min(multihost_utils.process_allgather(np.int64(stats.get("bytes_limit", 0)))))
    return least or None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _count_scalars(step: int, counts: dict[str, Any]) -> dict[str, int]:
    """The records of all processes, on the first; they meet at the coordination service, not in a collective."""
    own = {"data/read": counts["read"], "data/used": counts["used"]}
    own |= {f"data/bad/{kind}": count for kind, count in counts["bad"].items()}
    if jax.process_count() == 1:
        return own
    client, folder = ocp.multihost.get_jax_distributed_client(), f"flip_jax/counts/{step}/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(own))
    _meet(folder)
    total = collections.Counter()
    if jax.process_index() == 0:
        for _, theirs in client.key_value_dir_get(folder):
            total.update(json.loads(theirs))
        client.key_value_delete(folder)
    return dict(total)


def _meet(name: str) -> None:
    """Waits for all processes, without using the devices."""
    processes = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(f"flip_jax/{name}", timeout=1200, processes=processes)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _log_start(config: Config, mesh: Mesh, program: train_step.Program, flops: float) -> None:
    params = sum(x.size for x in jax.tree.leaves(program.state.params))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    _say(
        f"{params / 1e6:,.1f} M parameters, {flops / 1e9:,.1f} GFLOP a sample, "
        f"{mesh.size} {jax.devices()[0].device_kind} ({axes}), {jax.process_count()} process(es), "
        f"{config.total_steps:,} steps of {config.global_batch_size:,} samples"
    )
