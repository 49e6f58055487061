"""Stand-ins for the programs that launch/ calls, and the desk from which tests call the scripts.

`Desk` copies this file under the names gcloud, kubectl and so on. Run as one of them it records the call, and gcloud
plays TPU VMs: each is a folder of $DESK/machines, NODE-WORKER, where remote commands run.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import time

REPO = pathlib.Path(__file__).parent.parent
VARIABLES = (
    "NAME ZONE PROJECT ACCELERATOR RUNTIME NFS TIER SLICES POLL_SECONDS IMAGE TOPOLOGY CHIPS_PER_HOST "
    "NODES GPUS_PER_NODE TIME PROCESSES PORT PYTHON"
).split()


class Desk:
    """A PATH of stand-ins, and what they were called with."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.add("bin", "gcloud", "kubectl", "sbatch", "srun", "scancel", "sleep", "git", "tail", "my python")
        self.add("machine_bin", "python3", "sudo", "mountpoint")
        self.env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        self.env |= {"PATH": f"{folder}/bin:{os.environ['PATH']}", "DESK": str(folder), "TMPDIR": str(folder)}

    def add(self, where, *names):
        (self.folder / where).mkdir()
        for name in names:
            (self.folder / where / name).write_text(f"#!{sys.executable} -S\n" + pathlib.Path(__file__).read_text())
            (self.folder / where / name).chmod(0o755)

    def run(self, script, *words, **variables):
        command = [str(REPO / "launch" / f"{script}.sh"), *words]
        return subprocess.run(command, env=self.env | variables, capture_output=True, text=True, timeout=60)

    def on_machine(self, command):
        how = {"cwd": self.folder / "machines" / "0-0", "env": self.env, "timeout": 60}
        return subprocess.run(["bash", "-c", command], **how, capture_output=True, text=True)

    def answer(self, question, *lines):
        (self.folder / f"answers.{question}").write_text("".join(f"{line}\n" for line in lines))

    def calls(self, *programs, machines=None):
        """Calls so far: of some programs, and on machines or not."""
        file = self.folder / "calls"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        calls = [call for call in calls if not programs or call["program"] in programs]
        return [call for call in calls if machines is None or (call["machine"] is not None) == machines]

    def verbs(self):
        """Requests to gcloud in order, without describe: create, scp, delete, or the start of a remote command."""
        words = [call["words"] for call in self.calls("gcloud")]
        asked = [w[3] if w[3] != "ssh" else shlex.split(option(w, "--command")) for w in words if w[3] != "describe"]
        return [what if isinstance(what, str) else " ".join(what[:2]) for what in asked]

    def started(self, count):
        """Calls of main.py on machines, which run in the background: waits until there are so many."""
        for _ in range(600):
            if len(calls := self.calls("python", machines=True)) == count:
                return calls
            time.sleep(0.1)
        raise AssertionError(f"{len(calls)} machines started the run, not {count}")


def option(words, name):
    (value,) = (word.partition("=")[2] for word in words if word.startswith(f"{name}="))
    return value


def flags(name):
    """Flags of launch/xla_flags.sh: TPU_XLA_FLAGS or GPU_XLA_FLAGS."""
    script = f'source "$1"; printf "%s\\n" "${{{name}[@]}}"'
    command = ["bash", "-c", script, "-", REPO / "launch" / "xla_flags.sh"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


DESK = pathlib.Path(os.environ.get("DESK", ""))
MACHINES = DESK / "machines"
PROGRAM, WORDS = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
OPTIONS = dict(word.split("=", 1) for word in WORDS if word.startswith("--") and "=" in word)


def main() -> int:
    here = pathlib.Path.cwd()
    call = {
        "program": PROGRAM,
        "words": WORDS,
        "machine": here.relative_to(MACHINES).parts[0] if here.is_relative_to(MACHINES) else None,
        "input": sys.stdin.read() if PROGRAM == "kubectl" else "",
        **{name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
    }
    with open(DESK / "calls", "a") as file:
        file.write(json.dumps(call) + "\n")
    if (answer := next_answer()) is not None:
        if answer != "fail":
            print(answer)
        return answer == "fail"
    if PROGRAM == "git":
        with tarfile.open(OPTIONS["--output"], "w:gz") as tar:
            tar.add(pathlib.Path(WORDS[WORDS.index("-C") + 1]) / "launch", "launch")
    return gcloud() if PROGRAM == "gcloud" else 0


def next_answer() -> str | None:
    """Take the next line that the test prepared for this question, None where there is none."""
    question = "describe" if "describe" in WORDS else OPTIONS.get("--command", PROGRAM).split()[-1]
    file = DESK / f"answers.{pathlib.Path(question).name}"
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines:
        return "ACTIVE" if question == "describe" else None
    file.write_text("".join(f"{line}\n" for line in lines[1:]))
    return lines[0]


def gcloud() -> int:
    if "create" in WORDS:
        for name in (f"{node}-{worker}" for node in range(int(OPTIONS.get("--node-count", 1))) for worker in range(2)):
            python = MACHINES / name / "flip_jax" / ".venv" / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(__file__, python)
    elif "delete" in WORDS:
        shutil.rmtree(MACHINES, ignore_errors=True)
    codes = [0]
    for machine in sorted(MACHINES.iterdir()) if {"ssh", "scp"} & set(WORDS) else ():
        wanted = (OPTIONS["--node"], OPTIONS["--worker"])
        if all(want in ("all", number) for want, number in zip(wanted, machine.name.split("-"), strict=True)):
            if "scp" in WORDS:
                source, target = WORDS[WORDS.index("scp") + 1 :][:2]
                shutil.copy(source, machine / target.partition(":")[2])
            else:
                env = os.environ | {"PATH": f"{DESK}/machine_bin:{os.environ['PATH']}"}
                codes.append(subprocess.run(["bash", "-c", OPTIONS["--command"]], cwd=machine, env=env).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
