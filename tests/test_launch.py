"""Which machines the launch scripts start, with which words and flags, and how they end; the clouds are stand-ins."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import REPO
from launch_stand_in import Desk, flags, option

LAUNCH = REPO / "launch"
SETTINGS = ["--config=configs/flip_l16.py", '--config.data.train=webdataset:gs://a b/{0..9}.tar;it\'s $HOME "*"']
TPU = {"NAME": "flip", "ZONE": "us-z", "PROJECT": "p", "ACCELERATOR": "v4-512", "RUNTIME": "base"}
GKE = {"NAME": "flip", "IMAGE": "r/flip", "ACCELERATOR": "tpu-v4-podslice", "TOPOLOGY": "4x4x8"}
SLURM = {"NAME": "flip", "NODES": "2", "GPUS_PER_NODE": "8", "TIME": "24:00:00"}
REQUIRED = {"tpu_vm": TPU, "gke": GKE, "slurm": SLURM, "local": {"PROCESSES": "2"}}


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.fixture
def slice_desk(desk):
    """A desk whose TPU slice is created and has the code."""
    for words in ("create", "install"):
        assert desk.run("tpu_vm", words, **TPU).returncode == 0
    (desk.folder / "calls").unlink()
    return desk


@pytest.mark.parametrize("script", REQUIRED)
def test_missing_variables_are_named_together_with_an_example(desk, script):
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
@pytest.mark.parametrize(("words", "message"), [(["fly"], "fly: "), ([], "no command"), (["run"], "settings")])
def test_wrong_commands_are_refused(desk, script, words, message):
    result = desk.run(script, *words, **REQUIRED[script])
    assert result.returncode == 2 and message in result.stderr and not desk.calls()


@pytest.mark.parametrize("script", REQUIRED)
def test_help_names_the_commands_and_the_variables(desk, script):
    result = desk.run(script, "--help")
    assert result.returncode == 0 and not desk.calls() and not result.stderr
    assert f"launch/{script}.sh" in result.stdout and "[--dry-run]" in result.stdout
    assert all(name in result.stdout.split("Environment: ")[1] for name in REQUIRED[script])


WRONG = ["tpu_vm SLICES=two", "tpu_vm TIER=cheap", "gke TOPOLOGY=4x4; rm", "gke TOPOLOGY=3x3", "gke NFS=share"]


@pytest.mark.parametrize("what", [*WRONG, "slurm NODES=0", "local PORT=http"])
def test_wrong_values_are_named(desk, what):
    script, _, assignment = what.partition(" ")
    name, _, value = assignment.partition("=")
    result = desk.run(script, "run", *SETTINGS, **REQUIRED[script] | {name: value})
    assert result.returncode == 2 and assignment in result.stderr and not desk.calls()


COMMANDS = {
    "tpu_vm": ("create", "install", "run", "logs", "delete"),
    "gke": ("logs", "delete"),
    "slurm": ("run", "logs", "delete"),
}


@pytest.mark.parametrize(("script", "verb"), [(script, verb) for script in COMMANDS for verb in COMMANDS[script]])
def test_a_dry_run_prints_the_commands_of_a_run_and_does_nothing(slice_desk, script, verb):
    words = [verb, *(SETTINGS if verb == "run" else ())]
    result = slice_desk.run(script, *words, "--dry-run", **REQUIRED[script])
    assert result.returncode == 0 and not slice_desk.calls(), result.stderr
    if verb == "create":
        shutil.rmtree(slice_desk.folder / "machines")
    assert slice_desk.run(script, *words, "--yes", **REQUIRED[script]).returncode == 0
    # Only the printed sbatch has `env NAME=VALUE ...` before it.
    printed = [shlex.split(line[max(line.find("sbatch "), 0) :]) for line in result.stdout.splitlines()]
    done = [[call["program"], *call["words"]] for call in slice_desk.calls(machines=False)]
    assert printed == done


def test_a_dry_run_of_watch_prints_what_follows_a_preemption(desk):
    def printed(*words):
        return desk.run("tpu_vm", *words, "--dry-run", **TPU).stdout.splitlines()

    looks, restarts = printed("watch", *SETTINGS)[:2], printed("watch", *SETTINGS)[2:]
    assert "describe" in looks[0] and "result" in looks[1]
    assert restarts == printed("delete") + printed("create") + printed("install") + printed("run", *SETTINGS)


def test_create_waits_until_the_machines_answer_or_the_request_fails(desk):
    desk.answer("describe", "WAITING_FOR_RESOURCES", "fail", "PROVISIONING", "ACTIVE")
    desk.answer("true", "fail")
    result = desk.run("tpu_vm", "create", TIER="spot", POLL_SECONDS="7", **TPU)
    assert result.returncode == 0, result.stderr
    assert [call["words"] for call in desk.calls("sleep")] == [["7"]] * 4  # three states, and one machine that is late
    assert desk.verbs() == ["create", "true", "true"]
    words = desk.calls("gcloud")[0]["words"]
    assert "flip" in words and "--spot" in words
    assert {"--zone=us-z", "--project=p", "--accelerator-type=v4-512", "--runtime-version=base"} <= set(words)
    desk.answer("describe", "FAILED")
    result = desk.run("tpu_vm", "create", **TPU | {"NAME": "other"})
    assert result.returncode == 2 and "other is FAILED" in result.stderr


def test_install_prepares_every_machine_and_mounts_only_a_shared_folder_that_is_given(desk):
    assert desk.run("tpu_vm", "create", SLICES="2", **TPU).returncode == 0
    assert desk.run("tpu_vm", "install", SLICES="2", **TPU).returncode == 0
    machines = ["0-0", "0-1", "1-0", "1-1"]
    for machine in machines:
        assert (desk.folder / "machines" / machine / "flip_jax" / "launch" / "worker.sh").exists()
    calls = desk.calls("python3")
    assert [call["machine"] for call in calls if ".[tpu,remote]" in call["words"]] == machines
    assert not desk.calls("sudo")
    desk.answer("mountpoint", *["fail"] * 4)
    result = desk.run("tpu_vm", "install", SLICES="2", NFS="1.2.3.4:/s", **TPU)
    mounts = [call for call in desk.calls("sudo") if call["words"][0] == "mount"]
    assert [call["machine"] for call in mounts] == machines
    assert all("1.2.3.4:/s" in call["words"] for call in mounts)
    if not os.access("/shared", os.W_OK):  # on the machines of this test it is the true one
        assert result.returncode != 0 and "cannot write to /shared (1.2.3.4:/s)" in result.stderr


def test_run_starts_the_same_words_and_flags_on_every_machine_of_every_slice(desk):
    for words in (["create"], ["install"], ["run", *SETTINGS]):
        assert desk.run("tpu_vm", *words, SLICES="2", **TPU).returncode == 0
    calls = desk.started(4)
    assert sorted(call["machine"] for call in calls) == ["0-0", "0-1", "1-0", "1-1"]
    for call in calls:
        assert call["words"] == ["main.py", "--distributed", *SETTINGS]
        assert call["LIBTPU_INIT_ARGS"].split() == flags("TPU_XLA_FLAGS")


def test_logs_follow_the_first_machine(slice_desk):
    assert slice_desk.run("tpu_vm", "logs", **TPU).returncode == 0
    (call,) = slice_desk.calls("tail")
    assert call["machine"] == "0-0" and call["words"][-1] == "flip_jax/run.log"


def test_watch_replaces_the_machines_after_a_preemption(slice_desk):
    desk = slice_desk
    desk.answer("describe", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "PROVISIONING")
    desk.answer("result", "running", "1", "running", "0")  # one machine is preempted, and the others end with an error
    (desk.folder / "machines" / "0-0" / "old").touch()
    result = desk.run("tpu_vm", "watch", *SETTINGS, POLL_SECONDS="9", **TPU)
    assert result.returncode == 0, result.stderr
    assert "flip was preempted" in result.stdout and "flip: the run has ended" in result.stdout
    worker = "flip_jax/launch/worker.sh"
    again = ["delete", "create", "true", "scp", "tar --one-top-level=flip_jax", f"{worker} install", f"{worker} run"]
    assert desk.verbs() == [*[f"{worker} result"] * 2, *again, *[f"{worker} result"] * 2]
    assert not (desk.folder / "machines" / "0-0" / "old").exists()
    for call in desk.started(2):
        assert call["words"] == ["main.py", "--distributed", *SETTINGS]


def test_watch_bears_a_lost_connection_and_ends_when_the_run_itself_failed(slice_desk):
    slice_desk.answer("describe", "ACTIVE", "fail", "ACTIVE", "ACTIVE")
    slice_desk.answer("result", "fail", "1", "1")
    result = slice_desk.run("tpu_vm", "watch", *SETTINGS, **TPU)
    assert result.returncode == 2 and "the run ended (1)" in result.stderr
    assert "first machine unreachable" in result.stdout and "flip is unknown" in result.stdout
    assert not {"delete", "create"} & set(slice_desk.verbs())


DELETES = {"tpu_vm": {"delete", "flip"}, "gke": {"delete", "jobset", "flip"}, "slurm": {"--me", "--name=flip"}}


@pytest.mark.parametrize("script", DELETES)
def test_delete_needs_yes(desk, script):
    result = desk.run(script, "delete", **REQUIRED[script])
    assert result.returncode == 2 and "--yes" in result.stderr and not desk.calls()
    assert desk.run(script, "delete", "--yes", **REQUIRED[script]).returncode == 0
    (call,) = desk.calls("gcloud", "kubectl", "scancel")
    assert DELETES[script] <= set(call["words"])


def test_a_machine_reports_the_state_of_its_run(slice_desk):
    checkout = slice_desk.folder / "machines" / "0-0" / "flip_jax"
    (checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\nread wait < go\nexit 3\n")
    os.mkfifo(checkout / "go")
    run, result = "flip_jax/launch/worker.sh run '' --config=x", "flip_jax/launch/worker.sh result"
    assert slice_desk.on_machine(result).stdout == "gone\n"
    for _ in range(2):  # after its end a run may start again
        assert slice_desk.on_machine(run).returncode == 0
        assert slice_desk.on_machine(result).stdout == "running\n"
        again = slice_desk.on_machine(run)
        assert again.returncode == 1 and "already" in again.stderr
        (checkout / "go").write_text("go\n")
        for _ in range(300):
            if (found := slice_desk.on_machine(result).stdout) not in ("running\n", ""):
                break
        assert found == "3\n"


def test_gke_applies_a_jobset_with_a_pod_per_host(desk):
    result = desk.run("gke", "run", *SETTINGS, SLICES="2", NFS="1.2.3.4:/s", **GKE)
    assert result.returncode == 0, result.stderr
    (call,) = desk.calls()
    assert call["program"] == "kubectl" and call["words"][0] == "apply"
    manifest = json.loads(call["input"])
    assert manifest["kind"] == "JobSet" and manifest["metadata"]["name"] == "flip"
    assert "gke-nodepool" in str(manifest["metadata"]["annotations"])  # each slice in a node pool of its own
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 1
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert group["replicas"] == 2 and job["parallelism"] == job["completions"] == 4 * 4 * 8 / 4
    pod = job["template"]["spec"]
    assert set(pod["nodeSelector"].values()) == {"tpu-v4-podslice", "4x4x8"}
    assert pod["volumes"][0]["nfs"] == {"server": "1.2.3.4", "path": "/s"}
    (container,) = pod["containers"]
    read = [word.replace("$$", "$") for word in container["command"]]  # as Kubernetes does
    assert read == ["python", "main.py", "--distributed", *SETTINGS]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"} and container["volumeMounts"]
    assert container["env"] == [{"name": "LIBTPU_INIT_ARGS", "value": " ".join(flags("TPU_XLA_FLAGS"))}]


def test_gke_dry_run_prints_the_manifest_and_needs_no_shared_folder(desk):
    result = desk.run("gke", "run", *SETTINGS, "--dry-run", **GKE)
    manifest, _, command = result.stdout.rstrip().rpartition("\n")
    assert result.returncode == 0 and command.startswith("kubectl apply") and not desk.calls()
    assert json.loads(manifest)["kind"] == "JobSet" and "volume" not in manifest


def test_slurm_starts_a_process_per_gpu(desk):
    assert desk.run("slurm", "run", *SETTINGS, **SLURM, PYTHON="my python").returncode == 0
    (call,) = desk.calls("sbatch")
    words = {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=24:00:00", "--requeue", "--export=ALL"}
    words |= {"--cpus-per-task=8"}
    assert words <= set(call["words"]) and call["XLA_FLAGS"].split() == flags("GPU_XLA_FLAGS")
    job = call["words"][call["words"].index(str(LAUNCH / "slurm_job.sh")) :]
    where = option(call["words"], "--chdir")
    subprocess.run(
        job, env=desk.env | {"PYTHON": "my python", "SLURM_CPUS_PER_TASK": "8"}, cwd=where, check=True, timeout=30
    )
    (call,) = desk.calls("srun")
    assert call["words"][-len(SETTINGS) - 3 :] == ["my python", "main.py", "--distributed", *SETTINGS]
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=8"} <= set(call["words"])


def test_local_starts_every_process(desk):
    settings = {"PROCESSES": "3", "PORT": "4321", "PYTHON": "my python"}
    assert desk.run("local", "run", *SETTINGS, **settings).returncode == 0
    calls = [call["words"] for call in desk.calls("my python")]
    assert sorted(option(words, "--process_id") for words in calls) == ["0", "1", "2"]
    for words in calls:
        assert words[0] == "main.py" and words[-2:] == SETTINGS
        assert (option(words, "--num_processes"), option(words, "--coordinator")) == ("3", "127.0.0.1:4321")
    dry = desk.run("local", "run", *SETTINGS, "--dry-run", **settings).stdout.splitlines()
    assert [shlex.split(line)[1:] for line in dry[1:]] == sorted(calls)


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
