"""Job files: read back, checked against what the schedulers say of them, and run as far as that goes."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from burnish.cli import main
from burnish.config.load import load_config
from burnish.errors import ConfigError
from burnish.jobs.options import JobOptions, job_name
from burnish.jobs.write import job_file


@pytest.fixture
def config_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    path = Path("sft.yaml")
    path.write_text("model: {path: model}\ndata: {train: train.jsonl}\noutput_dir: runs/My First_Run\n")
    return path


def directives(script):
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
    return dict(([*line.removeprefix("#SBATCH --").split("=", 1), ""])[:2] for line in lines)


def test_the_sbatch_script_says_what_was_asked(config_path):
    options = JobOptions(
        num_nodes=4, gpus_per_node=8, cpus_per_node=96, partition="gpu", account="lab", time="2-00:00:00"
    )
    path, script = job_file("slurm", config_path, ["--optim.lr", "2e-5"], options)
    assert path == Path("my-first-run.sbatch")
    said = directives(script)
    assert said["nodes"] == "4"
    assert said["ntasks-per-node"] == said["gpus-per-node"] == "8"
    assert said["cpus-per-task"] == "12"
    assert (said["partition"], said["account"], said["time"]) == ("gpu", "lab", "2-00:00:00")
    assert said["signal"] == "B:USR1@600"
    assert "requeue" in said
    assert f"{shlex.quote(sys.executable)} -m burnish train sft.yaml --optim.lr 2e-5" in script
    assert "mem" not in said
    # Directives after the first command are not read by sbatch.
    body = script.splitlines()
    first = next(i for i, line in enumerate(body) if line and not line.startswith("#"))
    assert all("#SBATCH" not in line for line in body[first:])


FAKE_SRUN = """\
#!/bin/bash
# Stands for srun: runs the command as its only task and passes signals on, as srun does.
while [[ $1 == --* ]]; do shift; done
"$@" & task=$!
trap 'kill -TERM $task' TERM
wait $task; code=$?
while kill -0 $task 2>/dev/null; do wait $task; code=$?; done
exit $code
"""
FAKE_TASK = """\
import signal, sys, time
def stop(number, frame):
    open("saved", "a").write("x")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open("started", "w").close()
code = int(open("behaviour").read())
while code < 0:
    time.sleep(0.05)
sys.exit(code)
"""


def run_script(script, folder, behaviour, send=None):
    """Run an sbatch script where srun and scontrol are stand-ins; returns exit code and requeues."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "srun").write_text(FAKE_SRUN)
    (tools / "scontrol").write_text('#!/bin/bash\necho "$@" >> requeued\n')
    (tools / "python").write_text(f"#!/bin/bash\nexec {sys.executable} task.py\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (folder / "task.py").write_text(FAKE_TASK)
    (folder / "behaviour").write_text(str(behaviour))
    for name in ("requeued", "saved", "started"):
        (folder / name).unlink(missing_ok=True)
    (folder / "job.sh").write_text(script)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    process = subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environment)
    if send is not None:
        deadline = time.monotonic() + 30
        while not (folder / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(send)
    code = process.wait(timeout=30)
    requeued = folder / "requeued"
    return code, requeued.read_text().splitlines() if requeued.exists() else []


@pytest.mark.parametrize(
    ("behaviour", "send", "code", "requeues"),
    [
        (-1, signal.SIGUSR1, 143, 1),  # the time limit is near: saved, and back into the queue
        (75, None, 75, 1),  # a rank hung
        (0, None, 0, 0),  # done
        (2, None, 2, 0),  # a mistake in the config stays one
        (5, None, 5, 0),  # training stopped itself
        (143, None, 143, 0),  # scancel: the tasks got their own SIGTERM
    ],
)
def test_the_sbatch_script_ends_and_goes_on_as_it_should(
    config_path, tmp_path, behaviour, send, code, requeues
):
    _, script = job_file("slurm", config_path, options=JobOptions(python="python"))
    assert run_script(script, tmp_path, behaviour, send) == (code, ["requeue 77"] * requeues)
    assert (tmp_path / "saved").exists() == (send is not None)


def test_the_tasks_may_end_before_the_script_has_dealt_with_the_signal(config_path, tmp_path):
    _, script = job_file("slurm", config_path, options=JobOptions(python="python"))
    told = 'kill -TERM "$tasks"'
    slowly = script.replace(told, f"{told}; sleep 1")
    assert slowly != script
    assert run_script(slowly, tmp_path, -1, signal.SIGUSR1) == (143, ["requeue 77"])


def test_a_sigterm_to_the_script_alone_does_not_end_it(config_path, tmp_path):
    _, script = job_file("slurm", config_path, options=JobOptions(python="python"))
    later = "(sleep 1; kill -TERM $$; sleep 0.5; echo 0 > behaviour) &"
    script = script.replace("tasks=$!", f"tasks=$!\n{later}", 1)
    waiting = "time.sleep(0.05)"
    task = FAKE_TASK.replace(waiting, f"{waiting}; code = int(open('behaviour').read() or -1)")
    script = script.replace("set -u", f"set -u\ncat > task.py <<'END'\n{task}END", 1)
    assert run_script(script, tmp_path, -1) == (0, [])


def test_the_train_job(config_path):
    options = JobOptions(
        num_nodes=2, gpus_per_node=4, memory="500Gi", image="registry/burnish:1", volume="data:/data"
    )
    path, text = job_file("k8s", config_path, ["--data.max_tokens", "512"], options)
    assert path == Path("my-first-run.trainjob.yaml")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"] == {"name": "my-first-run"}
    spec = job["spec"]
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    trainer = spec["trainer"]
    assert (trainer["image"], trainer["numNodes"]) == ("registry/burnish:1", 2)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 4, "memory": "500Gi"}
    mounts = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = mounts["template"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "data"}
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/data"


def test_the_config_arrives_in_the_container_unchanged(config_path, tmp_path):
    """Run what the container would run, with a torchrun that only shows what it was given."""
    config_path.write_text(config_path.read_text() + "log: {trackers: []}\n")
    flags = ["--data.max_tokens", "512", "--output_dir", 'runs/it\'s $(HOME) "100%"']
    _, text = job_file("k8s", config_path, flags, JobOptions(image="i", name="a"))
    trainer = yaml.safe_load(text)["spec"]["trainer"]
    env = {e["name"]: e["value"].replace("$$(", "$(") for e in trainer["env"]}  # as Kubernetes does
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/bash\necho "$@"; cp /tmp/burnish.yaml arrived.yaml\n')
    torchrun.chmod(0o755)
    command = [part.replace("/tmp/burnish.yaml", str(tmp_path / "in.yaml")) for part in trainer["command"]]
    torchrun.write_text(torchrun.read_text().replace("/tmp/burnish.yaml", str(tmp_path / "in.yaml")))
    done = subprocess.run(
        command,
        env={**os.environ, **env, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["--module", "burnish", "train", str(tmp_path / "in.yaml")]
    assert load_config(Path("arrived.yaml"), []) == load_config(config_path, flags)


def test_the_sky_task(config_path, tmp_path):
    options = JobOptions(num_nodes=3, gpus_per_node=8, gpu="H100", cpus_per_node=64)
    path, text = job_file("skypilot", config_path, ["--optim.lr", "2e-5"], options)
    assert path == Path("my-first-run.sky.yaml")
    task = yaml.safe_load(text)
    assert (task["num_nodes"], task["workdir"]) == (3, ".")
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 3}
    # What a node would run, with programs that only say how they were called.
    for name in ("torchrun", "python"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    node = {
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NUM_NODES": "3",
        "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6\n10.0.0.7",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-c", task["run"]], env=node, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "python -m burnish check sft.yaml --optim.lr 2e-5",
        "torchrun --nnodes 3 --nproc_per_node 8 --node_rank 0 --master_addr 10.0.0.5 --master_port 29500 "
        "--module burnish train sft.yaml --optim.lr 2e-5",
    ]


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("slurm", JobOptions(num_nodes=0, gpus_per_node=-1), ["--num-nodes", "--gpus-per-node"]),
        ("slurm", JobOptions(time="tomorrow"), ["--time"]),
        ("slurm", JobOptions(name="$(rm)"), ["--name"]),
        ("slurm", JobOptions(cpus_per_node=4), ["--cpus-per-node"]),
        ("k8s", JobOptions(volume="data"), ["--image", "--volume"]),
        ("skypilot", JobOptions(), ["--gpu"]),
    ],
)
def test_what_cannot_be_right_is_said_at_once(config_path, kind, options, named):
    with pytest.raises(ConfigError) as caught:
        job_file(kind, config_path, options=options)
    assert [problem.where for problem in caught.value.problems] == named


def test_a_wrong_config_makes_no_job(config_path):
    with pytest.raises(ConfigError, match="optim"):
        job_file("slurm", config_path, ["--optim.learning_rate", "1"])


@pytest.mark.parametrize(
    ("text", "name"), [("My First_Run", "my-first-run"), ("7b.v2", "run-7b-v2"), ("x" * 90, "x" * 63)]
)
def test_job_names(text, name):
    assert job_name(text) == name


def verb(*words):
    """Exit code of `burnish launch WORDS`."""
    with pytest.raises(SystemExit) as caught:
        main(["launch", *words])
    return caught.value.code


def test_the_verb_writes_a_file_and_never_over_another(config_path, capsys):
    words = ["slurm", "sft.yaml", "--num-nodes", "2", "--optim.lr", "2e-5"]
    assert verb(*words) == 0
    assert capsys.readouterr().out.endswith("sbatch my-first-run.sbatch\n")
    script = Path("my-first-run.sbatch").read_text()
    assert directives(script)["nodes"] == "2"
    assert "train sft.yaml --optim.lr 2e-5" in script
    assert verb(*words) == 0  # the same again is no loss
    assert verb(*words, "--train.epochs", "2") == 2
    assert "is there already" in capsys.readouterr().err
    Path("model.bin").write_bytes(b"\xff\xfe")
    assert verb(*words, "--out", "model.bin") == 2
    assert "model.bin is there already" in capsys.readouterr().err
    assert verb("k8s", "sft.yaml") == 2
    assert "--image" in capsys.readouterr().err
    assert verb("slurm", "--num-nodes", "2") == 2
    assert "a job needs a config file" in capsys.readouterr().err
