"""Kill runs at random moments and damage checkpoints; look for runs that end otherwise than docs/reliability.md says.

python -m benchmarks.faults OUT

A tiny model is trained on generated images. Kills: a run is started, killed by SIGKILL in a random moment of its
start, of a step, of a save or of an evaluation, and started again until it ends. It must end with the bits, the data
position and the metrics of a run that nobody disturbed, without a trace, and the complete steps that a kill leaves must
be whole. Damage: a bit of a file of the newest step is flipped, or the file is cut; a run that resumes must name the
file and take the step before, and some do so to the end. Results are appended to OUT/faults.jsonl, and the same command
resumes. Two CPU cores need about an hour.
"""

import argparse
import contextlib
import io
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from PIL import Image

from benchmarks import pages
from flip_jax import damage, manifest

REPO = pathlib.Path(__file__).parent.parent
STEPS, SAVED, EVALUATED = 36, 4, 9  # steps of a run, and between two saves and two evaluations
MOMENTS = ("start", "step", "save", "evaluation")
SAVE_SECONDS, EVALUATION_SECONDS, LOOP_SECONDS = 1.0, 0.6, 4.0  # about; moments are drawn from these spans
RESUMED = 100  # one of so many damaged checkpoints is trained to the end
SEEN = ("step", "loss", "samples_seen", "data/read", "data/used", "zeroshot/mean")


def write_data(folder: pathlib.Path) -> None:
    """Write four shards of 32 squares in eight colours, each with its caption and class."""
    colours = {f"{a} {b}": (a == "light") * 90 + i * 20 for a in ("light", "dark") for i, b in enumerate("wxyz")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in colours))
    rng = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(32):
                name, value = list(colours.items())[i % 8]
                pixels = rng.integers(0, 60, (40, 40, 3)).astype(np.uint8)
                pixels[8:32, 8:32] += np.uint8(value)
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                for ending, data in (("png", png.getvalue()), ("txt", name.encode()), ("cls", b"%d" % (i % 8))):
                    info = tarfile.TarInfo(f"{shard}{i:02}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class Run:
    """The processes of a run in a workdir, and what they have written."""

    def __init__(self, out: pathlib.Path, workdir: pathlib.Path, processes: int):
        data = out / "data"
        settings = {
            "data.train": f"webdataset:{data}/{{0..3}}.tar",
            "data.shuffle_window": 50,
            "model.image.image_size": 32,
            "model.image.patch_size": 8,
            "model.image.mask_ratio": 0.5,
            **{f"model.{t}.{k}": v for t in ("image", "text") for k, v in (("width", 32), ("depth", 2), ("heads", 4))},
            "model.embed_dim": 16,
            "model.text.vocab_size": 60,
            "model.text.context_length": 8,
            "model.dtype": "float32",
            "global_batch_size": 32,
            "total_samples": 32 * STEPS,
            "warmup_samples": 128,
            "checkpoint.every_steps": SAVED,
            "log.every_steps": 1,
            "eval.every_steps": EVALUATED,
            "eval.tasks": f"zeroshot/webdataset:{data}/{{0..3}}.tar",
            "eval.classnames": data / "classes.txt",
            "eval.batch_size": 32,
            "mesh.fsdp": processes,
        }
        command = [sys.executable, "main.py", "--config=configs/flip_b16.py", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
            # Programs of several processes on CPUs must be compiled alike, and the first process alone fills the cache.
            "JAX_ENABLE_COMPILATION_CACHE": str(processes == 1).lower(),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._logs, self.processes = [], []
        for i in range(processes):
            own = [f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={i}"]
            self._logs.append(out / f"process_{processes}_{i}.log")
            with self._logs[i].open("w") as log:
                how = {"cwd": REPO, "env": env, "stdout": log, "stderr": subprocess.STDOUT}
                self.processes.append(subprocess.Popen(command + own * (processes > 1), **how))

    def said(self) -> str:
        """Return the output of all processes so far."""
        return "".join(log.read_text(errors="replace") for log in self._logs)

    def until(self, happened) -> bool:
        """Wait for happened(); return False if a process ends before."""
        while not happened():
            if any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.003)
        return True

    def kill(self, rng: np.random.Generator) -> None:
        """Kill one process, and the others within half a second, as a scheduler does."""
        for i in rng.permutation(len(self.processes)):
            self.processes[i].send_signal(signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.5) * (len(self.processes) > 1))
        self.wait()

    def wait(self) -> list[int]:
        """Return the exit codes."""
        return [process.wait() for process in self.processes]


def undisturbed(out: pathlib.Path, processes: int) -> pathlib.Path:
    """Return the workdir of a run that nobody disturbs; made once."""
    workdir = out / f"undisturbed_{processes}"
    if not (workdir / "done").exists():
        for _ in range(2):  # the second finds its programs compiled
            shutil.rmtree(workdir, ignore_errors=True)
            run = Run(out, workdir, processes)
            if any(run.wait()):
                raise SystemExit(f"the undisturbed run failed:\n{run.said()[-3000:]}")
        (workdir / "done").write_text(run.said().partition("first step done ")[2].partition(" s")[0])
    return workdir


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the state of a run's last step, which several processes may have written."""
    step = epath.Path(workdir) / "checkpoints" / str(STEPS) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(step).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(step, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def differences(ours: pathlib.Path, theirs: pathlib.Path) -> list[str]:
    """Name what the end of two runs has different: arrays of the state, data position, metrics."""
    found = []
    one, other = arrays(ours), arrays(theirs)
    found += [name for name in one.keys() | other.keys() if not np.array_equal(one.get(name), other.get(name))]
    for path in sorted((ours / "checkpoints" / str(STEPS) / "data").glob("*.json")):
        if path.read_bytes() != (theirs / path.relative_to(ours)).read_bytes():
            found.append(path.name)
    lines = [
        [{name: line.get(name) for name in SEEN} for line in pages.read(workdir / "metrics.jsonl")]
        for workdir in (ours, theirs)
    ]
    return found + (["metrics.jsonl"] if lines[0] != lines[1] else [])


def kill_once(out: pathlib.Path, workdir: pathlib.Path, processes: int, moment: str, rng: np.random.Generator) -> dict:
    """Start or resume a run and kill it in a moment, unless it ends before; return what was seen."""
    first_step = float((undisturbed(out, processes) / "done").read_text())
    checkpoints = workdir / "checkpoints"
    before = time.monotonic()
    run = Run(out, workdir, processes)

    def begun():
        return "first step done" in run.said()

    def saving():
        return checkpoints.is_dir() and any("tmp" in path.name for path in checkpoints.iterdir())

    if moment == "start":
        span, alive = first_step, True
    elif moment == "step":
        span, alive = LOOP_SECONDS, run.until(begun)
    elif moment == "save":
        span, alive = SAVE_SECONDS, run.until(begun)
        for _ in range(rng.integers(1, 4)):  # the first, second or third save
            alive = alive and run.until(lambda: not saving()) and run.until(saving)
    elif moment == "never":
        span, alive = 0, run.until(lambda: False)
    else:
        last = rng.integers(1, STEPS // EVALUATED + 1) * EVALUATED
        due = [f"step {step}/" for step in range(EVALUATED, STEPS + 1, EVALUATED) if step >= last]
        span, alive = EVALUATION_SECONDS, run.until(lambda: any(line in run.said() for line in due))
    end = time.monotonic() + rng.uniform(0, span)
    alive = alive and run.until(lambda: time.monotonic() > end)
    wrong = []
    if alive:
        run.kill(rng)
    else:
        codes = run.wait()
        wrong += [f"exit codes {codes}"] * any(codes)
    said = run.said()
    wrong += [f"said {word}" for word in ("Traceback", "damaged", "error:") if word in said]
    steps = manifest.complete(epath.Path(checkpoints))
    found = {step: damage.problems(epath.Path(checkpoints / str(step))) for step in steps}
    wrong += [f"step {step}: {found[step]}" for step in steps if found[step]]
    if not alive and not wrong:
        wrong += [f"differs: {name}" for name in differences(workdir, undisturbed(out, processes))]
    return {
        "kind": "kill" if alive else "end",
        "processes": processes,
        "moment": moment,
        "wrong": wrong,
        "seconds": round(time.monotonic() - before, 1),
        "said": said[-1500:] if wrong else "",
    }


def kill(out: pathlib.Path, processes: int, wanted: int) -> None:
    """Kill runs until there have been so many kills, and the last run has ended."""
    path, workdir = out / "faults.jsonl", out / f"killed_{processes}"
    while True:
        done = [result for result in pages.read(path) if result.get("processes") == processes]
        kills = [result for result in done if result["kind"] == "kill"]
        if len(kills) >= wanted and done[-1]["kind"] == "end":
            return
        rng = np.random.default_rng([processes, len(done)])
        moment = MOMENTS[len(done) % len(MOMENTS)]
        if len(kills) >= wanted:
            moment = "never"
        result = kill_once(out, workdir, processes, moment, rng)
        pages.append(path, [result])
        print(f"{len(kills)}/{wanted} kills of {processes}: {moment}, {result['kind']}, {result['wrong'] or 'right'}")
        if result["kind"] == "end" or result["wrong"]:
            shutil.rmtree(workdir)


def alter(path: pathlib.Path, kind: str, rng: np.random.Generator) -> None:
    """Flip a random bit of a file, or cut it at a random place."""
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    if kind == "flip":
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
    else:
        os.truncate(path, place)


def hurt(out: pathlib.Path, kind: str, wanted: int) -> None:
    """Damage a file of the newest step so many times, and have it checked as a run does when it resumes."""
    path, whole = out / "faults.jsonl", undisturbed(out, 1)
    for number in range(sum(result["kind"] == kind for result in pages.read(path)), wanted):
        rng = np.random.default_rng([len(kind), number])
        workdir = out / "hurt"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(whole, workdir)
        checkpoints = workdir / "checkpoints"
        before, newest = sorted(int(step.name) for step in checkpoints.iterdir())[-2:]
        step = checkpoints / str(newest)
        files = sorted(file for file in step.rglob("*") if file.is_file() and file.stat().st_size)
        sizes = np.array([file.stat().st_size for file in files], float)
        # Every second one by bytes, as a disk would do it; the others reach the small files as well.
        victim = files[rng.choice(len(files), p=sizes / sizes.sum() if number % 2 else None)]
        alter(victim, kind, rng)
        name, wrong = str(victim.relative_to(step)), []
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            damage.set_aside(epath.Path(checkpoints), strict=False)
        steps = manifest.complete(epath.Path(checkpoints))
        # A manifest that is damaged itself may seem to say that another file is.
        if "damaged" not in said.getvalue() or name not in (*said.getvalue().split(), manifest.NAME):
            wrong.append(f"{name}: {said.getvalue() or 'nothing was noticed'}")
        if steps[-1] != before or not (checkpoints / f"damaged-{newest}").is_dir():
            wrong.append(f"{name}: steps {steps}")
        if number % RESUMED == 0:
            os.rename(checkpoints / f"damaged-{newest}", checkpoints / str(newest))
            run = Run(out, workdir, 1)
            codes, output = run.wait(), run.said()
            wrong += [f"exit codes {codes}"] * any(codes) + ["said Traceback"] * ("Traceback" in output)
            wrong += [] if f"/{newest} is damaged" in output else ["the run said nothing"]
            wrong += [f"differs: {name}" for name in differences(workdir, whole)]
        pages.append(path, [{"kind": kind, "file": name, "wrong": wrong, "resumed": number % RESUMED == 0}])
        if wrong:
            print(kind, wrong)
    shutil.rmtree(out / "hurt", ignore_errors=True)


def rows(results: list[dict]) -> Iterator[str]:
    """Format the table of docs/reliability.md."""
    yield "| fault | times | ended as promised | otherwise |\n|---|---|---|---|"
    for processes, of in ((1, "one process"), (2, "two processes")):
        ours = [result for result in results if result.get("processes") == processes]
        for moment in MOMENTS:
            name = f"SIGKILL during {'an' if moment == 'evaluation' else 'a'} {moment}, {of}"
            yield from row(name, [r for r in ours if (r["kind"], r["moment"]) == ("kill", moment)])
        name = f"run of {of} that ended after such kills: same bits, data position and metrics"
        yield from row(name, [result for result in ours if result["kind"] == "end"])
    yield from row("a bit of a file of the newest step is flipped", [r for r in results if r["kind"] == "flip"])
    yield from row("a file of the newest step is cut", [r for r in results if r["kind"] == "cut"])


def row(name: str, found: list[dict]) -> Iterator[str]:
    """Format a line of the table; none without results."""
    if found:
        wrong = sum(bool(result["wrong"]) for result in found)
        yield f"| {name} | {len(found)} | {len(found) - wrong} | {wrong} |"


def main() -> None:
    """Do what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, metavar="OUT", help="folder for runs and results")
    parser.add_argument("--kills", type=int, default=188, metavar="N", help="of runs of one process (default: 188)")
    parser.add_argument("--kills_of_two", type=int, default=12, metavar="N", help="of two processes (default: 12)")
    parser.add_argument("--flips", type=int, default=500, metavar="N", help="bits to flip (default: 500)")
    parser.add_argument("--cuts", type=int, default=200, metavar="N", help="files to cut (default: 200)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    write_data(out / "data")
    hurt(out, "flip", arguments.flips)
    hurt(out, "cut", arguments.cuts)
    if arguments.kills:
        kill(out, 1, arguments.kills)
    if arguments.kills_of_two:
        kill(out, 2, arguments.kills_of_two)
    results = pages.read(out / "faults.jsonl")
    print("\n".join(rows(results)))


if __name__ == "__main__":
    main()
