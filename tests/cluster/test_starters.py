"""`burnish train` started by torchrun, srun and the deepspeed launcher, on one host and on two.

All give the losses of `burnish train --launch.num_processes 2`. srun is simulated by the variables
that it sets; the second host is a network namespace.
"""

import contextlib
import functools
import os
import socket
import subprocess
import sys

import hosts as two
import pytest
import tiny_job

LIMIT_SECONDS = 240
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    return tiny_job.write_tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def reference(config_path):
    """Losses of one host with two processes, by engine; each is computed once."""

    @functools.cache
    def losses(engine):
        run_dir = config_path.parent / f"reference-{engine}"
        flags = ["--launch.num_processes", "2", "--engine.kind", engine, "--output_dir", str(run_dir)]
        done = subprocess.run(
            train_command(config_path, *flags),
            env={**os.environ, **tiny_job.ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = tiny_job.losses(run_dir)
        assert len(found) == tiny_job.NUM_STEPS
        return found

    return losses


@pytest.fixture
def hosts():
    with two.two_hosts() as pair:
        yield pair


def train_command(config_path, *flags):
    return [sys.executable, "-m", "burnish", "train", str(config_path), *flags]


def start(argv, environ):
    """Start a program on this host."""
    return subprocess.Popen(
        argv,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(processes):
    """Wait for all; whatever is left when one fails or takes too long is killed."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        for process in processes:
            output, _ = process.communicate(timeout=LIMIT_SECONDS)
            assert process.returncode == 0, output


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slurm_step(task, node_list, local_id):
    """What srun sets for one of two tasks."""
    return {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(local_id),
        "SLURM_STEP_NODELIST": node_list,
        "SLURM_JOB_NODELIST": node_list,
    }


def torchrun(nodes, rank, address, port, config_path, *flags):
    module = ["-m", "burnish", "train", str(config_path), *flags]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)),
        *("--nproc-per-node", str(2 // nodes), "--node-rank", str(rank)),
        *("--master-addr", address, "--master-port", str(port), *module),
    ]


def deepspeed(hostfile, rank, address, port, config_path, *flags):
    """The deepspeed launcher on each node by itself, as it is used where there is no ssh. It puts
    `--local_rank=N` in front of the program's arguments."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    node = ["--no_ssh", "--node_rank", str(rank), "--master_addr", address, "--master_port", str(port)]
    return [*launcher, *node, "--module", "burnish", "train", str(config_path), *flags]


def same_losses(run_dir, expected):
    assert tiny_job.losses(run_dir) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_torchrun_on_one_host(config_path, tmp_path, reference):
    flags = ["--engine.kind", "local", "--output_dir", str(tmp_path)]
    argv = torchrun(1, 0, "127.0.0.1", free_port(), config_path, *flags)
    wait([start(argv, tiny_job.ENVIRONMENT)])
    same_losses(tmp_path, reference("local"))


@pytest.mark.slow
def test_srun_on_one_host(config_path, tmp_path, reference):
    argv = train_command(config_path, "--engine.kind", "local", "--output_dir", str(tmp_path))
    step = slurm_step(0, "localhost", 0)
    second = {**step, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    wait([start(argv, {**tiny_job.ENVIRONMENT, **environ}) for environ in (step, second)])
    same_losses(tmp_path, reference("local"))


def test_two_hosts_with_torchrun_and_deepspeed(config_path, tmp_path, reference, hosts):
    flags = ["--engine.kind", "deepspeed", "--output_dir", str(tmp_path)]
    wait(
        [
            host.start(torchrun(2, rank, hosts[0].address, 29511, config_path, *flags), tiny_job.ENVIRONMENT)
            for rank, host in enumerate(hosts)
        ]
    )
    same_losses(tmp_path, reference("deepspeed"))


@pytest.mark.slow
def test_two_hosts_with_srun(config_path, tmp_path, reference, hosts):
    argv = train_command(config_path, "--engine.kind", "deepspeed", "--output_dir", str(tmp_path))
    step = slurm_step(0, hosts[0].address.removesuffix("1") + "[1-2]", 0)
    environs = [{**tiny_job.ENVIRONMENT, **step, "SLURM_PROCID": str(task)} for task in range(2)]
    wait([host.start(argv, environ) for host, environ in zip(hosts, environs, strict=True)])
    same_losses(tmp_path, reference("deepspeed"))


@pytest.mark.slow
def test_two_hosts_with_the_deepspeed_launcher_and_a_hostfile(config_path, tmp_path, reference, hosts):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    flags = ["--engine.kind", "deepspeed", "--output_dir", str(tmp_path / "run")]
    commands = [deepspeed(hostfile, i, hosts[0].address, 29512, config_path, *flags) for i in range(2)]
    wait([host.start(argv, tiny_job.ENVIRONMENT) for host, argv in zip(hosts, commands, strict=True)])
    same_losses(tmp_path / "run", reference("deepspeed"))


@pytest.mark.slow
def test_the_deepspeed_launcher_on_one_host(config_path, tmp_path, reference):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    flags = ["--engine.kind", "deepspeed", "--output_dir", str(tmp_path / "run")]
    wait([start(deepspeed(hostfile, 0, "127.0.0.1", free_port(), config_path, *flags), tiny_job.ENVIRONMENT)])
    same_losses(tmp_path / "run", reference("deepspeed"))
