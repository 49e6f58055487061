"""Measure `flip inspect` and `flip prepare` with one and two workers, and how they start on 50,000 shards.

usage: python -m benchmarks.data_tools [--before=CHECKOUT] [--rounds=3] [--shards=16] [--records=250] [--many=50000]

Every round runs each command once, in turn, on JPEGs of 640 x 480 that are made first; --before is a checkout of an
earlier version, whose commands have no workers. Prints JSON lines: records per second of each, ratios of the rounds by
their medians, and the processor time of a record, which other work on the machine changes less. Then seconds until the
first of so many small shards (hard links) is done, and the peak memory of the process that hands them out, over the
whole run.
"""

import argparse
import io
import itertools
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent


def write_shard(path, records, seed, size=(640, 480)):
    """Write a tar of JPEGs of about 90 kB, each another one, and captions."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(records):
            # Noise at several scales is as hard to decode as a photo.
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
            fine = Image.fromarray(rng.integers(0, 256, (size[1] // 2, size[0] // 2, 3), np.uint8)).resize(size)
            out = io.BytesIO()
            Image.blend(image, fine, 0.2).save(out, "JPEG", quality=90)
            for extension, data in (("jpg", out.getvalue()), ("txt", b"an image of number %d" % i)):
                info = tarfile.TarInfo(f"{i:05}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def run(checkout, folder, *arguments):
    """Run a command of `flip` of a checkout; return its seconds, by the clock and of the processors."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "flip_jax", *arguments]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(folder, arguments):
    """Print rates of both commands, and their ratios."""
    for shard in range(arguments.shards):
        write_shard(folder / f"{shard:05}.tar", arguments.records, shard)
    source, records = f"webdataset:{folder}/*.tar", arguments.shards * arguments.records
    programs = {"workers 1": (ROOT, ["--workers=1"]), "workers 2": (ROOT, ["--workers=2"])}
    if arguments.before:
        programs["before"] = (arguments.before.absolute(), [])
    commands = {
        "inspect": ["inspect", source, "--out=report"],
        "prepare": ["prepare", source, "out", "--shards=8", "--shortest_side=256"],
        "prepare, unchanged": ["prepare", source, "out", "--shards=8"],
    }
    for name, command in commands.items():
        seconds = {program: [] for program in programs}
        processor = {program: [] for program in programs}
        for _ in range(arguments.rounds):
            for program, (checkout, more) in programs.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                by_clock, busy = run(checkout, folder, *command, *more)
                seconds[program].append(by_clock)
                processor[program].append(busy)
        ratios = {
            f"{b} over {a}": statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
            for a, b in itertools.permutations(programs, 2)
            if (a, b) in (("workers 1", "workers 2"), ("before", "workers 1"), ("before", "workers 2"))
        }
        rates = {program: round(records / statistics.median(some)) for program, some in seconds.items()}
        rounded = {key: round(value, 2) for key, value in ratios.items()}
        line = {"command": name, "records_per_second": rates, "times as fast": rounded}
        busy = {program: round(statistics.median(some) / records * 1000, 2) for program, some in processor.items()}
        print(json.dumps(line | {"processor_ms_per_record": busy}), flush=True)


def peak(process):
    """Return the peak resident bytes of a process, 0 once it has ended."""
    try:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return max([0, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))])


def start_many(folder, count):
    """Print how long `flip prepare` takes until the first of many shards is done, and its memory."""
    write_shard(folder / "one.tar", 2, 0, size=(64, 48))
    (folder / "many").mkdir()
    for i in range(count):
        os.link(folder / "one.tar", folder / "many" / f"{i:06}.tar")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    source = f"webdataset:{folder}/many/{{{0:06}..{count - 1:06}}}.tar"
    command = [sys.executable, "-m", "flip_jax", "prepare", source, str(folder / "even"), "--shards=64", "--workers=2"]
    start, first, most, work = time.perf_counter(), None, 0, folder / "even" / "work"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            most = max(most, peak(process))
            if first is None and work.is_dir() and any(name.startswith("filter-") for name in os.listdir(work)):
                first = time.perf_counter() - start
            time.sleep(0.2)
            if first is not None:
                time.sleep(1)
        if process.returncode:
            raise SystemExit(process.stderr.read().decode()[-2000:])
    seconds = time.perf_counter() - start
    figures = {"shards": count, "first_done_after_s": round(first, 1), "all_after_s": round(seconds, 1)}
    print(json.dumps(figures | {"peak_rss_mib": round(most / 2**20)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=pathlib.Path, metavar="CHECKOUT", help="of an earlier version")
    parser.add_argument("--rounds", type=int, default=3, help="of all programs in turn")
    parser.add_argument("--shards", type=int, default=16, help="of the source")
    parser.add_argument("--records", type=int, default=250, help="of a shard")
    parser.add_argument("--many", type=int, default=50_000, help="small shards, 0 to skip them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(pathlib.Path(folder), arguments)
    if arguments.many:
        with tempfile.TemporaryDirectory() as folder:
            start_many(pathlib.Path(folder), arguments.many)


if __name__ == "__main__":
    main()
