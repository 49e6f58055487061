"""Locks: the second program is refused, and what a dead one left is taken over."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import REPO, Bucket, environment, samples, write_tar

from flip_jax import lease, lock, runtime
from flip_jax.runtime import UserError

HOLDER = """
import sys, time
from flip_jax import lock
with lock.hold(sys.argv[1], "OUT"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run/lock until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPO, env=environment(), **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_program_is_refused_until_the_first_has_ended(holder, tmp_path, capsys):
    path = tmp_path / "run" / "lock"
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(UserError, match=rf"^OUT is in use by process {holder.pid} on .*, started 20.*: wait until"):
            with lock.hold(path, "OUT"):
                pass
    holder.stdin.close()
    holder.wait()
    assert not path.exists()
    with lock.hold(path, "OUT"):
        assert f"process {os.getpid()} on " in path.read_text() and len(runtime.at_end) == 1
    assert not path.exists() and not runtime.at_end and capsys.readouterr().err == ""


def test_the_lock_of_a_killed_program_is_taken_over(holder, tmp_path, capsys):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.hold(tmp_path / "run" / "lock", "OUT"):
        said = capsys.readouterr().err
    assert said.startswith(f"OUT was locked by process {holder.pid} on ") and said.endswith(
        ", which has ended: taken over\n"
    )


def test_of_many_programs_one_holds_the_lock_at_a_time(tmp_path):
    """Each adds to a counter while it holds the lock; without one, some would read what another is about to replace."""
    program = f"""
import time
from flip_jax import lock
from flip_jax.runtime import UserError
for _ in range(20):
    while True:
        try:
            with lock.hold({str(tmp_path / "lock")!r}, "OUT"):
                count = int(open({str(tmp_path / "count")!r}).read())
                time.sleep(0.001)
                open({str(tmp_path / "count")!r}, "w").write(str(count + 1))
            break
        except UserError:
            time.sleep(0.002)
"""
    (tmp_path / "count").write_text("0")
    programs = [subprocess.Popen([sys.executable, "-c", program], cwd=REPO, env=environment()) for _ in range(4)]
    assert [process.wait(timeout=120) for process in programs] == [0] * 4
    assert (tmp_path / "count").read_text() == "80"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir x cannot be made or written to: .*Not a directory"):
        with lock.hold(tmp_path / "file" / "run" / "lock", "--workdir x"):
            pass


def test_a_second_prepare_on_one_folder_is_refused_at_once(tmp_path):
    write_tar(tmp_path / "0.tar", samples(20))
    command = [sys.executable, "-m", "flip_jax", "prepare", f"webdataset:{tmp_path}/0.tar", str(tmp_path / "out")]
    with lock.hold(tmp_path / "out" / "lock", "OUT"):
        second = subprocess.run([*command, "--shards=2"], cwd=REPO, env=environment(), capture_output=True, text=True)
    assert second.returncode == 1 and "Traceback" not in second.stderr
    assert f"out' is in use by process {os.getpid()} on " in second.stderr
    assert os.listdir(tmp_path / "out") == []


@pytest.fixture
def store(monkeypatch):
    memory = Bucket()
    monkeypatch.setattr(lease.fsspec, "url_to_fs", lambda path: (memory, path))
    monkeypatch.setattr(lease, "RENEWED", 0.2)
    yield memory
    memory.store.clear()


def test_a_lease_is_renewed_and_refuses_a_second_program(store, capsys):
    with lock.hold("gs://bucket/run/lock", "--workdir gs://bucket/run"):
        content = store.cat_file("gs://bucket/run/lock")
        with pytest.raises(UserError, match=f"^--workdir gs://bucket/run is in use by process {os.getpid()} on "):
            lease.acquire("gs://bucket/run/lock", "--workdir gs://bucket/run")
        # As if the holder's clock were years behind: it is seen to renew the object.
        store.pipe_file("gs://bucket/run/lock", content.splitlines()[0] + b"\n1000\n")
        with pytest.raises(UserError, match="is in use by process"):
            lease.acquire("gs://bucket/run/lock", "--workdir gs://bucket/run")
    assert not store.exists("gs://bucket/run/lock") and capsys.readouterr().err == ""


def test_a_lease_that_nobody_renews_is_taken_over(store, capsys):
    store.pipe_file("gs://bucket/run/lock", b"process 1 on gone\n1000\n")
    with lock.hold("gs://bucket/run/lock", "the run"):
        assert f"process {os.getpid()} on ".encode() in store.cat_file("gs://bucket/run/lock")
    assert capsys.readouterr().err == "the run was locked by process 1 on gone, which does not renew it: taken over\n"


def test_a_store_without_a_conditional_write_has_no_lock_and_says_so(store, monkeypatch, capsys):
    monkeypatch.setattr(Bucket, "pipe_file", lambda self, path, value: None)
    with lock.hold("gs://bucket/run/lock", "the run"):
        pass
    assert "gs://bucket/run/lock: this store has no locks" in capsys.readouterr().err
