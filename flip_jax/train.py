"""The training loop."""

import contextlib
import dataclasses
import logging
import os
import signal
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flip_jax import checkpoint, lock, memory, metrics, models, optim, runtime, sharding
from flip_jax.config import Config, Stage
from flip_jax.data import pipeline
from flip_jax.runtime import UserError, say
from flip_jax.train_step import Program

_log = logging.getLogger(__name__)

IN_FLIGHT = 2  # steps given to the devices ahead of the one they work on
Report = tuple[int, list[str], dict[str, jax.Array]]  # step, keys of this process's samples, scalars on the devices


def train(config: Config, workdir: str | os.PathLike, started: float | None = None) -> int:
    """Trains to `config.total_samples`, from the newest checkpoint in `workdir` if there is one.

    Returns the exit code: 130 if Ctrl-C stopped the run, else 0.

    The time to the first step is counted from `started`, a value of `time.perf_counter` (None: now).

    Raises:
      UserError: settings, data or checkpoints that do not fit together, each with its remedy, or a loss that is not
        finite: the message names the step and the keys of its samples.
    """
    started = time.perf_counter() if started is None else started
    workdir = epath.Path(workdir)
    if config.profile and runtime.is_remote(workdir):
        raise UserError(f"config.profile cannot write to {workdir}; profile a few steps with a --workdir on a disk")
    if config.model.text.mask_counts:
        from flip_jax.data import token_counts  # few runs need it

        config = token_counts.identified(config)
    mesh = sharding.make_mesh(config.mesh)
    stages = plan(config)
    for stage in stages:
        check_batches(stage.config, mesh)
    limit = memory.device_memory()  # before this process takes some of it
    if limit and memory.on_cpu(mesh) and not config.init_model:  # whose size is not known yet
        from flip_jax import too_large

        for stage in stages:
            too_large.check(stage.config, mesh, limit)
    if config.eval.tasks:
        from flip_jax import evaluators

        if reasons := evaluators.problems(config):  # named together with the training data where these are missing, too
            raise UserError("\n".join([*pipeline.problems(config), *reasons]))
    metrics.check(config)
    saving = config.checkpoint
    with (
        lock.hold(workdir / lock.NAME, f"--workdir {workdir}", together=True),
        contextlib.closing(checkpoint.Checkpoints(workdir, saving.keep, saving.strict)) as checkpoints,
        jax.set_mesh(mesh),
        runtime.Termination() as termination,
    ):
        _run(config, workdir, mesh, limit, checkpoints, termination, started)
    return 128 + signal.SIGINT if termination.interrupted else 0


def plan(config: Config) -> list[Stage]:
    """Lists the stages of a run: one, unless `config.stages` describes them."""
    if not config.stages:
        return [Stage(config, config.total_steps)]
    from flip_jax import stages  # only runs with stages need it

    return stages.plan(config)


def _run(
    config: Config,
    workdir: epath.Path,
    mesh: Mesh,
    limit: int | None,
    checkpoints: checkpoint.Checkpoints,
    termination: runtime.Termination,
    started: float,
) -> None:
    start = checkpoints.latest() or 0
    origin = None
    if start or config.init_from:
        from flip_jax import origins  # only runs that resume or start from weights need it

        origin = origins.find(config, checkpoints)
        config = origin.config
    elif config.init_model:
        raise UserError("config.init_model takes the architecture of config.init_from, which is empty: set it")
    remaining = [stage for stage in plan(config) if stage.last > start]
    if not remaining:
        from flip_jax import saved_config

        longer = saved_config.longer(config)
        _log.info("%s: all %d steps of this run are done; to train longer, %s", workdir, start, longer)
        return
    tokenizer = pipeline.make_tokenizer(config, origin and origin.tokenizer)
    class_names: tuple[str, ...] = ()
    if config.finetune.classes:
        from flip_jax.data import classes

        class_names = classes.trained(config)
        if origin and start:
            classes.check_unchanged(class_names, origin.step)
    batches = _batches(remaining[0], tokenizer)
    # All of them now: a stage that does not fit is refused before the run begins, and no step waits for the compiler.
    recorded = origin and origin.recorded
    compiled = [_compile(stage, mesh, limit, recorded if stage.first < start else None) for stage in remaining]
    end = remaining[-1].last
    # Some processes may have found the program in their cache, and collectives of CPUs wait for 30 s at most.
    runtime.meet("compiled")
    state = origin.state(*compiled[0], checkpoints, batches) if origin else compiled[0][1].init()
    writer = metrics.Writer(workdir, start, config)
    progress = metrics.Progress(start, end)
    window: list[Report] = []  # the steps since the last log point
    waited = 0.0
    # A run resumed inside the profiled range is not profiled again.
    first_traced, last_traced = config.profile if config.profile and start < config.profile[0] else (0, 0)
    for number, (stage, program) in enumerate(compiled):
        if number:
            from flip_jax import stages

            batches = stages.follow(batches, _batches(stage, tokenizer))
            state = stages.enter(stage, program, state)
        flops = models.flops_per_sample(stage.config)
        _say_start(stage, mesh, program, flops)
        metrics.write_parameters(workdir, program.state.params)
        evaluate = None
        if config.eval.wanted:
            from flip_jax.evaluators import in_training

            evaluate = in_training.evaluation(stage, program, tokenizer, class_names, mesh, writer, termination)
        later = sum(x.config.total_samples * models.flops_per_sample(x.config) for x, _ in compiled[number + 1 :])
        progress.begin(flops, stage.config.global_batch_size, stage.last, later)
        for step in range(max(start, stage.first) + 1, stage.last + 1):
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
                say(f"first step done {time.perf_counter() - started:.1f} s after the start of the program")
            if step == last_traced:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            window.append((step, batch["keys"], report))
            if jax.default_backend() == "cpu":
                # Collectives of two programs that run on CPUs at once can wait for each other forever.
                jax.block_until_ready((state, report))
            elif len(window) > IN_FLIGHT:
                # Bounds the batches that wait on the devices; the step waited for is done long before they run dry.
                jax.block_until_ready(window[-1 - IN_FLIGHT][2])
            stop, last = termination.reached(), step == end
            save = stop or last or _due(step, config.checkpoint.every_steps)
            evaluating = evaluate and (last or _due(step, config.eval.every_steps))
            if save or evaluating or step == stage.last or _due(step, config.log.every_steps):
                scalars = summarise(window, workdir)
                scalars |= {"samples_seen": stage.samples_seen(step), **progress.report(step)}
                scalars["input_wait_seconds"], waited = waited, 0.0
                scalars |= _count_scalars(step, batch["counts"])
                window.clear()
                writer.write(step, scalars)
                say(metrics.progress_line(step, end, scalars, stage.name))
            checkpoints.say_saved()
            if evaluating:
                with progress.pause("evaluation", config.eval.every_steps):
                    evaluate(getattr(state, "ema", state.params), batch, step)  # the average where one is kept
                stop = termination.stopping
            if save or stop:
                with progress.pause("save", config.checkpoint.every_steps):
                    checkpoints.save(step, state, batches, tokenizer, stage.config, class_names, config)
            if stop:
                break
        if stop:
            break
    writer.close()
    if stop and not last:
        checkpoints.wait()
        cause = "interrupted" if termination.interrupted else "SIGTERM"
        say(f"{cause}: saved step {step} of {end} in {workdir}; run the same command to resume")


def _batches(stage: Stage, tokenizer: Any) -> Any:
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return iter(pipeline.train_dataset(stage.config, tokenizer, **processes))


def _compile(stage: Stage, mesh: Mesh, limit: int | None, recorded: Config | None) -> tuple[Stage, Program]:
    """Compiles a stage, with what fits for "auto" in its config."""
    before = time.perf_counter()
    config, program, peak = memory.choose(stage.config, mesh, limit, recorded, stage.first)
    parts = f"{config.microbatches} microbatches, " if config.microbatches != 1 else ""
    of = f" of {limit / 2**30:.2f}" if limit else ""
    say(
        f"{stage.name}compiled in {time.perf_counter() - before:.0f} s: remat {config.model.remat}, {parts}"
        f"{peak / 2**30:.2f} GiB{of} per device"
    )
    return dataclasses.replace(stage, config=config), program


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises UserError where the training or evaluation batch cannot be split evenly over the mesh."""
    shards = sharding.batch_shards(mesh)
    microbatches = 1 if config.microbatches == "auto" else config.microbatches
    sizes = {"global_batch_size": (config.global_batch_size, microbatches)}
    if config.eval.wanted:
        sizes["eval.batch_size"] = (config.eval.batch_size, 1)
    for key, (size, microbatches) in sizes.items():
        parts = shards * microbatches
        if size % parts:
            times = f" times {microbatches} microbatches" if microbatches > 1 else ""
            raise UserError(
                f"config.{key} {size} does not divide by the {shards} devices that the batch is split over "
                f"(mesh data x fsdp){times}; the nearest that does is {max(1, round(size / parts)) * parts}"
            )
        pipeline.share(f"config.{key}", size, jax.process_count())


def summarise(window: list[Report], workdir: epath.Path) -> dict[str, float]:
    """Fetches the reports of the steps since the last log point: the mean loss, the other scalars of the last step.

    Raises:
      UserError: a loss is not finite. The samples' keys (of this process) go to WORKDIR/nonfinite_STEP.txt.
    """
    reports = jax.device_get([report for _, _, report in window])
    for (step, keys, _), report in zip(window, reports, strict=True):
        if not np.isfinite(report["loss"]):
            process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
            path = workdir / f"nonfinite_{step}{process}.txt"
            path.write_text("\n".join(keys) + "\n")
            raise UserError(
                f"the loss of step {step} is {report['loss']}; nothing was saved since. Its samples: {keys[:4]} ... "
                f"(all in {path}). Look at them, lower config.optim.base_learning_rate or raise config.warmup_samples."
            )
    scalars = {name: float(value) for name, value in reports[-1].items()}
    return scalars | {"loss": float(np.mean([report["loss"] for report in reports]))}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _count_scalars(step: int, counts: dict[str, Any]) -> dict[str, int]:
    """Sums read, used and bad records over all processes; empty except on the first one."""
    own = {"data/read": counts["read"], "data/used": counts["used"]}
    own |= {f"data/bad/{kind}": count for kind, count in counts["bad"].items()}
    return runtime.sum_counts(f"counts/{step}", own)


def _say_start(stage: Stage, mesh: Mesh, program: Program, flops: float) -> None:
    params = sum(x.size for x in jax.tree.leaves(program.state.params))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(
        f"{stage.name}{params / 1e6:,.1f} M parameters, {flops / 1e9:,.1f} GFLOP per sample, "
        f"{mesh.size} {jax.devices()[0].device_kind} ({axes}), {jax.process_count()} process(es), "
        f"{stage.last - stage.first:,} steps of {stage.config.global_batch_size:,} samples"
    )
    say(optim.describe_peak(stage.config))
