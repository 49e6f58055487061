"""The launch scripts against stand-ins of gcloud, kubectl and the rest, which record how they are called."""

import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import REPO

LAUNCH = REPO / "launch"
SETTINGS = ["--config=configs/flip_l16.py", '--config.data.train=webdataset:gs://a b/{0..9}.tar;it\'s $HOME "*"']
TPU = {"NAME": "flip", "ZONE": "us-z", "PROJECT": "p", "ACCELERATOR": "v4-512", "RUNTIME": "base", "NFS": "1.2.3.4:/s"}
GKE = {"NAME": "flip", "IMAGE": "r/flip", "ACCELERATOR": "tpu-v4-podslice", "TOPOLOGY": "4x4x8", "NFS": "1.2.3.4:/s"}
SLURM = {"NAME": "flip", "NODES": "2", "GPUS_PER_NODE": "8", "TIME": "24:00:00"}
REQUIRED = {"tpu_vm": {**TPU}, "gke": {**GKE}, "slurm": SLURM, "local": {"PROCESSES": "2"}}
del REQUIRED["tpu_vm"]["NFS"], REQUIRED["gke"]["NFS"]  # not needed where the workdir is in an object store
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
PLACE = ["--zone=us-z", "--project=p"]
ALL = ["--node=all", "--worker=all"]

# Records its words, input and flags; prints the next of the answers that are left for its subcommand, and fails at "!".
STAND_IN = """#!{python} -S
import json, os, pathlib, sys
here = pathlib.Path({folder!r})
name = os.path.basename(sys.argv[0])
text = sys.stdin.read() if name == "kubectl" else ""
flags = {{key: os.environ.get(key) for key in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}}
with open(here / "calls", "a") as f:
    f.write(json.dumps([[name, *sys.argv[1:]], text, flags]) + "\\n")
verb = "result" if sys.argv[-1].endswith("worker.sh result") else "describe" if "describe" in sys.argv else name
answers = here / ("answers." + verb)
lines = answers.read_text().splitlines() if answers.exists() else []
if lines:
    answers.write_text("".join(line + "\\n" for line in lines[1:]))
    if lines[0] == "!":
        sys.exit(1)
    print(lines[0])
"""


class Desk:
    """A PATH of stand-ins, and what they were called with."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scancel", "sleep", "git", "tail", "my python"):
            (bin_folder / name).write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
            (bin_folder / name).chmod(0o755)
        # The true tail still ends a pipe.
        (bin_folder / "tail").write_text(
            f'#!/bin/sh\n[ "$1 $2" = "-n 1" ] && exec {shutil.which("tail")} "$@"\nexec "{bin_folder}/git" tail "$@"\n'
        )
        self.path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"

    def run(self, script, *words, **variables):
        optional = {"NFS", "TIER", "SLICES", "CHIPS_PER_HOST"}
        names = {name for required in REQUIRED.values() for name in required} | optional
        env = {name: value for name, value in os.environ.items() if name not in names} | variables
        command = [str(LAUNCH / f"{script}.sh"), *words]
        return subprocess.run(command, env=env | {"PATH": self.path}, capture_output=True, text=True, timeout=60)

    def calls(self):
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def words(self):
        return [words for words, _, _ in self.calls()]

    def answer(self, verb, *lines):
        (self.folder / f"answers.{verb}").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def flags(name):
    script = f'source "$1"; printf "%s\\n" "${{{name}[@]}}"'
    out = subprocess.run(
        ["bash", "-c", script, "-", LAUNCH / "xla_flags.sh"], capture_output=True, text=True, check=True
    )
    return out.stdout.split()


def create(*extra, node=("--node-id=flip",)):
    return [*QUEUE, "create", "flip", *PLACE, "--accelerator-type=v4-512", "--runtime-version=base", *node, *extra]


def ssh(command, where=ALL):
    return [*QUEUE, "ssh", "flip", *PLACE, *where, f"--command={command}"]


DESCRIBE = [*QUEUE, "describe", "flip", *PLACE, "--format=value(state.state)"]
DELETE = [*QUEUE, "delete", "flip", *PLACE, "--force", "--quiet"]
RESULT = ssh("flip_jax/launch/worker.sh result", ["--node=0", "--worker=0"])
ARCHIVE = "/tmp/flip_jax-flip.tar.gz"
INSTALL = [
    ["git", "-C", str(REPO), "archive", "--format=tar.gz", f"--output={ARCHIVE}", "HEAD"],
    [*QUEUE, "scp", ARCHIVE, "flip:flip_jax.tar.gz", *PLACE, *ALL],
    ssh("tar --one-top-level=flip_jax -xzf flip_jax.tar.gz"),
    ssh("flip_jax/launch/worker.sh install 1.2.3.4:/s"),
]


def check_run(words, arguments, libtpu):
    """A gcloud command that starts the run: what the shell on a machine reads is what was given here."""
    assert words[:-1] == ssh("")[:-1]
    remote = shlex.split(words[-1].removeprefix("--command="))
    assert remote == ["flip_jax/launch/worker.sh", "run", " ".join(libtpu), *arguments]


@pytest.mark.parametrize("script", REQUIRED)
def test_variables_that_are_missing_are_named_all_at_once_with_an_example(desk, script):
    names = list(REQUIRED[script])
    result = desk.run(script, "run", *SETTINGS)
    assert result.returncode == 2 and not desk.calls()
    assert f"error: not set: {' '.join(names)}. For example: " in result.stderr
    example = result.stderr.split("For example: ")[1]
    assert all(f"{name}=" in example for name in names)
    for name in names[1:]:
        partial = {key: value for key, value in REQUIRED[script].items() if key != name}
        assert f"not set: {name}. " in desk.run(script, "run", *SETTINGS, **partial).stderr


@pytest.mark.parametrize("script", REQUIRED)
@pytest.mark.parametrize(("words", "message"), [(["fly"], "fly: not "), ([], "no command: "), (["run"], "settings")])
def test_wrong_commands_are_refused(desk, script, words, message):
    result = desk.run(script, *words, **REQUIRED[script])
    assert result.returncode == 2 and message in result.stderr and not desk.calls()


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("tpu_vm", "SLICES", "two"),
        ("tpu_vm", "TIER", "cheap"),
        ("gke", "TOPOLOGY", "4x4; rm"),
        ("gke", "TOPOLOGY", "3x3"),
        ("gke", "NFS", "share"),
        ("slurm", "NODES", "0"),
        ("local", "PORT", "http"),
    ],
)
def test_wrong_values_are_named(desk, script, name, value):
    result = desk.run(script, "run", *SETTINGS, **REQUIRED[script] | {name: value})
    assert result.returncode == 2 and f"{name}={value}" in result.stderr and not desk.calls()


@pytest.mark.parametrize(
    ("script", "words"),
    [("tpu_vm", [verb]) for verb in ("create", "install", "logs", "delete")]
    + [("tpu_vm", ["run", *SETTINGS]), ("tpu_vm", ["watch", *SETTINGS]), ("gke", ["logs"]), ("gke", ["delete"])]
    + [("slurm", ["run", *SETTINGS]), ("slurm", ["logs"]), ("slurm", ["delete"])],
)
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(desk, script, words):
    result = desk.run(script, *words, "--dry-run", **REQUIRED[script])
    assert result.returncode == 0 and not desk.calls(), result.stderr
    printed = [shlex.split(line) for line in result.stdout.splitlines()]
    desk.answer("describe", *["SUSPENDED", "ACTIVE", "ACTIVE"] if words[0] == "watch" else ["ACTIVE"])
    desk.answer("result", "0")
    assert desk.run(script, *words, "--yes", **REQUIRED[script]).returncode == 0
    done = desk.words()
    if script == "slurm" and words[0] == "run":
        printed = [line[line.index("sbatch") :] for line in printed]
    if words[0] == "logs" and script == "slurm":
        done = [["tail", *done[0][2:]]]
    if words[0] == "watch":  # which looks, and starts again, and looks until the end
        keep = [call for call in done if call[0] != "sleep"]
        assert keep == [DESCRIBE, *printed[2:], DESCRIBE, RESULT] and printed[:2] == [DESCRIBE, RESULT]
    else:
        assert printed == done


def test_create_waits_until_the_machines_are_there_and_answer(desk):
    desk.answer("describe", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    result = desk.run("tpu_vm", "create", TIER="spot", POLL_SECONDS="7", **TPU)
    wait = [DESCRIBE, ["sleep", "7"]]
    assert result.returncode == 0, result.stderr
    assert desk.words() == [create("--spot"), *wait, *wait, DESCRIBE, ssh("true")]


def test_create_ends_where_the_request_fails(desk):
    desk.answer("describe", "FAILED")
    result = desk.run("tpu_vm", "create", **TPU)
    assert result.returncode == 2 and "flip is FAILED" in result.stderr


def test_install_sends_the_commit_to_every_machine(desk):
    assert desk.run("tpu_vm", "install", **TPU).returncode == 0
    assert desk.words() == INSTALL


def test_a_shared_folder_is_not_needed(desk):
    without = {name: value for name, value in (TPU | GKE).items() if name != "NFS"}
    assert desk.run("tpu_vm", "install", **without).returncode == 0
    assert desk.words() == [*INSTALL[:-1], ssh("flip_jax/launch/worker.sh install ''")]
    assert desk.run("gke", "run", *SETTINGS, **without).returncode == 0
    pod = json.loads(desk.calls()[-1][1])["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "volumes" not in pod and "volumeMounts" not in pod["containers"][0]


def test_run_gives_settings_on_unchanged(desk):
    assert desk.run("tpu_vm", "run", *SETTINGS, **TPU).returncode == 0
    check_run(desk.words()[0], SETTINGS, flags("TPU_XLA_FLAGS"))


def test_several_slices_are_one_request(desk):
    desk.answer("describe", "ACTIVE")
    assert desk.run("tpu_vm", "create", SLICES="4", **TPU).returncode == 0
    assert desk.words() == [create(node=["--node-count=4", "--node-prefix=flip"]), DESCRIBE, ssh("true")]


def test_watch_makes_everything_anew_after_a_preemption(desk):
    desk.answer("describe", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE")
    desk.answer("result", "running", "1", "running", "0")  # a machine is taken, and the others end with an error
    result = desk.run("tpu_vm", "watch", *SETTINGS, POLL_SECONDS="9", **TPU)
    assert result.returncode == 0, result.stderr
    wait, calls = ["sleep", "9"], desk.words()
    before = [DESCRIBE, RESULT, wait, DESCRIBE, RESULT, wait, DESCRIBE, wait, DESCRIBE]
    again = [DELETE, create(), DESCRIBE, wait, DESCRIBE, ssh("true"), *INSTALL]
    assert calls[: len(before + again)] == before + again
    check_run(calls[len(before + again)], SETTINGS, flags("TPU_XLA_FLAGS"))
    assert calls[len(before + again) + 1 :] == [wait, DESCRIBE, RESULT, wait, DESCRIBE, RESULT]
    assert "flip was preempted" in result.stdout and "flip: the run has ended" in result.stdout


def test_watch_ends_where_the_run_itself_failed_and_bears_what_passes(desk):
    desk.answer("describe", "ACTIVE", "!", "ACTIVE", "ACTIVE")
    desk.answer("result", "!", "1", "1")
    result = desk.run("tpu_vm", "watch", *SETTINGS, **TPU)
    assert result.returncode == 2 and "the run ended (1)" in result.stderr
    assert "first machine unreachable" in result.stdout and "flip is unknown" in result.stdout
    assert not any("delete" in words or "create" in words for words in desk.words())


@pytest.mark.parametrize(("script", "verb"), [("tpu_vm", "delete"), ("gke", "delete"), ("slurm", "scancel")])
def test_delete_needs_yes(desk, script, verb):
    result = desk.run(script, "delete", **REQUIRED[script])
    assert result.returncode == 2 and "--yes" in result.stderr and not desk.calls()
    assert desk.run(script, "delete", "--yes", **REQUIRED[script]).returncode == 0
    expected = {"tpu_vm": DELETE, "gke": ["kubectl", "delete", "jobset", "flip"]}
    assert desk.words() == [expected.get(script, ["scancel", "--me", "--name=flip"])]


@pytest.fixture
def machine(desk, tmp_path):
    """A function that runs worker.sh as on a TPU VM, where pip, mount and Python are stand-ins."""
    checkout = tmp_path / "home" / "flip_jax"
    (checkout / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "worker.sh", checkout / "launch")
    stand_in = (tmp_path / "bin" / "gcloud").read_text()
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for file in (checkout / ".venv" / "bin" / "python", tmp_path / "bin" / "python3"):
        file.write_text(stand_in)
        file.chmod(0o755)

    def run(command):
        env = os.environ | {"PATH": desk.path}
        how = {"cwd": tmp_path / "home", "env": env, "capture_output": True, "text": True, "timeout": 30}
        return subprocess.run(["bash", "-c", command], **how)

    run.checkout = checkout
    return run


def ends(machine):
    for _ in range(300):
        if (result := machine("flip_jax/launch/worker.sh result").stdout) not in ("running\n", "\n", ""):
            break
    return result


def test_what_ssh_gets_runs_on_a_machine_with_the_same_words(desk, machine):
    assert desk.run("tpu_vm", "run", *SETTINGS, **TPU).returncode == 0
    command = desk.words()[0][-1].removeprefix("--command=")
    result = machine(command)
    assert result.returncode == 0, result.stderr
    assert ends(machine) == "0\n"
    words, _, environment = desk.calls()[-1]
    assert words == ["python", "main.py", "--distributed", *SETTINGS]
    assert environment["LIBTPU_INIT_ARGS"].split() == flags("TPU_XLA_FLAGS")


def test_a_machine_says_how_its_run_is(machine):
    python = machine.checkout / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nread wait < go\nexit 3\n")
    os.mkfifo(machine.checkout / "go")
    run, result = "flip_jax/launch/worker.sh run '' --config=x", "flip_jax/launch/worker.sh result"
    assert machine(result).stdout == "gone\n"
    assert machine(run).returncode == 0
    assert machine(result).stdout == "running\n"
    again = machine(run)
    assert again.returncode == 1 and "already" in again.stderr
    (machine.checkout / "go").write_text("go\n")
    assert ends(machine) == "3\n"
    assert machine(run).returncode == 0  # after an end it may start again, and has no result then
    assert machine(result).stdout == "running\n"
    (machine.checkout / "go").write_text("go\n")


def test_gke_applies_a_jobset(desk):
    assert desk.run("gke", "run", *SETTINGS, SLICES="2", **GKE).returncode == 0
    [(words, manifest, _)] = desk.calls()
    assert words == ["kubectl", "apply", "-f", "-"]
    manifest = json.loads(manifest)
    spec, annotations = manifest["spec"], manifest["metadata"]["annotations"]
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["metadata"]["name"] == "flip"
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    [group] = spec["replicatedJobs"]
    job = group["template"]["spec"]
    assert spec["failurePolicy"] == {"maxRestarts": 100} and group["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 4 * 4 * 8 / 4 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    assert pod["volumes"] == [{"name": "shared", "nfs": {"server": "1.2.3.4", "path": "/s"}}]
    [container] = pod["containers"]
    read = [word.replace("$$", "$") for word in container["command"]]  # as Kubernetes does
    assert read == ["python", "main.py", "--distributed", *SETTINGS]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container["env"] == [{"name": "LIBTPU_INIT_ARGS", "value": " ".join(flags("TPU_XLA_FLAGS"))}]


def test_gke_dry_run_prints_the_manifest(desk):
    result = desk.run("gke", "run", *SETTINGS, "--dry-run", **GKE)
    manifest, _, command = result.stdout.rstrip().rpartition("\n")
    assert result.returncode == 0 and command == "kubectl apply -f -" and not desk.calls()
    assert json.loads(manifest)["kind"] == "JobSet"


def test_slurm_gives_a_process_to_each_gpu(desk):
    assert desk.run("slurm", "run", *SETTINGS, **SLURM, PYTHON="my python").returncode == 0
    [(words, _, environment)] = desk.calls()
    job = str(LAUNCH / "slurm_job.sh")
    assert words[:4] == ["sbatch", "--job-name=flip", "--nodes=2", "--ntasks-per-node=8"]
    assert {"--gpus-per-node=8", "--time=24:00:00", "--requeue", "--export=ALL"} <= set(words)
    assert f"--chdir={REPO}" in words and words[words.index(job) + 1 :] == SETTINGS
    assert environment["XLA_FLAGS"].split() == flags("GPU_XLA_FLAGS")
    env = os.environ | {"PATH": desk.path, "PYTHON": "my python"}
    subprocess.run([job, *SETTINGS], env=env, check=True, timeout=30)
    expected = ["srun", "--kill-on-bad-exit=1", "my python", "main.py", "--distributed", *SETTINGS]
    assert desk.words()[-1] == expected


def test_local_starts_every_process(desk):
    result = desk.run("local", "run", *SETTINGS, PROCESSES="3", PORT="4321", PYTHON="my python")
    assert result.returncode == 0, result.stderr
    common = ["my python", "main.py", "--coordinator=127.0.0.1:4321", "--num_processes=3"]
    assert sorted(desk.words()) == [[*common, f"--process_id={i}", *SETTINGS] for i in range(3)]
    dry = desk.run("local", "run", *SETTINGS, "--dry-run", PROCESSES="3", PORT="4321", PYTHON="my python")
    assert [shlex.split(line) for line in dry.stdout.splitlines()][1:] == sorted(desk.words())


def test_local_ends_every_process_when_one_fails(desk):
    python = desk.folder / "bin" / "my python"
    python.write_text('#!/bin/sh\ncase "$*" in *process_id=1*) echo sorry; exit 7 ;; esac\nexec /bin/sleep 1000\n')
    result = desk.run("local", "run", *SETTINGS, PROCESSES="3", PYTHON="my python")
    assert result.returncode == 7 and "[1] sorry\n" in result.stdout


def test_shellcheck_finds_nothing():
    scripts = sorted(str(path.relative_to(REPO)) for path in LAUNCH.glob("*.sh"))
    shellcheck = str(pathlib.Path(sys.executable).parent / "shellcheck")
    result = subprocess.run([shellcheck, "-x", *scripts], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_gpu_flags_are_known_to_the_installed_compiler():
    assert accepts({"XLA_FLAGS": " ".join(flags("GPU_XLA_FLAGS"))}, "import jax; jax.numpy.zeros(1)") == (True, "")
    ok, error = accepts({"XLA_FLAGS": "--xla_gpu_no_such_flag=true"}, "import jax; jax.numpy.zeros(1)")
    assert not ok and "xla_gpu_no_such_flag" in error


@pytest.mark.parametrize("topology", ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_flags_are_known_to_the_installed_compiler(topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    program = f"""
import jax
from jax.experimental import topologies
device = topologies.get_topology_desc(platform="tpu", topology_name={topology!r}).devices[0]
place = jax.sharding.SingleDeviceSharding(device)
jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((128, 128), "float32", sharding=place)).compile()
"""
    env = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    ok, error = accepts(env | {"LIBTPU_INIT_ARGS": " ".join(flags("TPU_XLA_FLAGS"))}, program)
    assert ok, error


def accepts(env, program):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **env}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    return result.returncode == 0, result.stderr
