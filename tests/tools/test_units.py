"""Units are done once each whatever happens to the workers, and no worker outlives the process that started it."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest
from helpers import REPO
from unit_jobs import RECORDS, Numbers

from flip_jax.runtime import UserError
from flip_jax.tools import units
from flip_jax.tools.unit_workers import ENDS

SUM = sum(range(RECORDS))


def run(job, count, workers, threads=1):
    found = {}
    with units.Crew(job, units.Size(workers, threads=threads)) as crew:
        skipped = crew.run(range(count), lambda unit, answer: found.update({unit: answer}))
    return found, skipped


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_each_unit_is_done_once(tmp_path, workers):
    found, skipped = run(Numbers(tmp_path), 7, workers)
    assert not skipped and {unit: answer["total"] for unit, answer in found.items()} == dict.fromkeys(range(7), SUM)
    processes = {answer["process"] for answer in found.values()}
    assert processes == {os.getpid()} if not workers else os.getpid() not in processes and len(processes) <= workers
    assert not any(os.path.exists(f"/proc/{process}") for process in processes - {os.getpid()})


def test_workers_stay_for_the_next_units(tmp_path):
    found = []
    with units.Crew(Numbers(tmp_path), units.Size(1)) as crew:
        for _ in range(2):
            crew.run(range(3), lambda _, answer: found.append(answer["process"]))
    assert len(found) == 6 and len(set(found)) == 1


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_workers_cost_nothing_and_deadly_records_themselves(tmp_path, capsys, threads):
    job = Numbers(tmp_path, at_record=[(1, 4), (1, 7)], at_unit=[3], once=[0, 5], slow=[(6, 2)])
    found, skipped = run(job, 8, workers=2, threads=threads)
    assert skipped == {3: "SIGKILL"} and sorted(found) == [0, 1, 2, 4, 5, 6, 7]
    bad = {unit: answer["bad"] for unit, answer in found.items() if answer["bad"]}
    assert bad == {1: [["4", ENDS], ["7", ENDS]], 6: [["2", ENDS]]}
    lost = {1: 4 + 7, 6: 2}
    assert all(answer["total"] == SUM - lost.get(unit, 0) for unit, answer in found.items())
    said = capsys.readouterr().err
    assert "unit 3: skipped: 3 workers died, SIGKILL" in said and "unit 0: a worker died (SIGKILL); another" in said
    assert "unit 6: a worker died (SIGPROF" in said


def test_what_a_worker_raises(tmp_path):
    with pytest.raises(UserError, match="^refused$"):
        run(Numbers(tmp_path, error="user"), 4, 2)
    with pytest.raises(OSError, match="No space left") as caught:
        run(Numbers(tmp_path, error="full"), 4, 2)
    assert caught.value.errno == 28
    with pytest.raises(RuntimeError, match="(?s)in a worker:.*unit_jobs.py.*TypeError: a bug"):
        run(Numbers(tmp_path, error="bug"), 4, 2)
    with pytest.raises(UserError, match="--workers: 3 workers ended before they could begin.*exit status 7"):
        run(Numbers(tmp_path, unborn=True), 4, 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_its_starter(tmp_path, number):
    program = (
        "import sys; from flip_jax import runtime; from flip_jax.tools import units; from unit_jobs import Sleeper\n"
        "runtime.Interrupts().start()\n"
        "with units.Crew(Sleeper(sys.argv[1]), units.Size(2)) as crew: crew.run(range(4), print)"
    )
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
    )
    while len(started := list(tmp_path.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said and (number != signal.SIGINT or "interrupted" in said)
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{path.name}") for path in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))

    def size(workers, shards, ray=""):
        return units.size(types.SimpleNamespace(workers=workers, ray=ray), shards)

    assert size(None, 100) == (6, "", 1) and size(None, 2) == (2, "", 3) and size(2, 3) == (2, "", 1)
    assert size(None, 3, "auto") == (0, "auto", 1) and size(2, 3, "auto") == (2, "auto", 1)
    with pytest.raises(UserError, match="--workers=4: the source has 3 units of work, .*: use at most --workers=3"):
        size(4, 3)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'--ray needs Ray: pip install -e "\.\[ray\]"'):
        units.Crew(Numbers(tmp_path), units.Size(2, "auto"))
