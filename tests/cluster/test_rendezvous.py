"""Ranks and addresses from what each launcher leaves in the environment."""

import socket

import pytest

from burnish.errors import MachineError
from burnish.launch import num_workers
from burnish.rendezvous import (
    complete_environment,
    first_host,
    slurm_environment,
    without_launcher_flags,
)
from burnish.runtime import Ranks, ranks_from_environment, start_process_group

STEP = {
    "SLURM_JOB_ID": "4211",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NODELIST": "gpu[01-04]",
}


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node7", "node7"),
        ("gpu[03-05,09],login1", "gpu03"),
        ("gpu[3],cpu[1-9]", "gpu3"),
        ("alpha,beta", "alpha"),
        ("rack[1-2]node[7-8]", "rack1node7"),
        ("nid[000012,000015]-ib", "nid000012-ib"),
        ("10.77.0.[1-2]", "10.77.0.1"),
        ("a-1.cluster.example[2-3]", "a-1.cluster.example2"),
    ],
)
def test_first_host_of_a_node_list(node_list, host):
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", "[]", "a b", "x[]"])
def test_node_list_without_a_host(node_list):
    with pytest.raises(ValueError, match="node list"):
        first_host(node_list)


def test_a_slurm_step_gives_ranks_and_one_address_to_all():
    assert ranks_from_environment(STEP) == Ranks(11, 3, 16)
    environments = [slurm_environment({**STEP, "SLURM_PROCID": str(p)}) for p in range(16)]
    assert {e["MASTER_ADDR"] for e in environments} == {"gpu03"}
    assert len({e["MASTER_PORT"] for e in environments}) == 1
    assert [int(e["RANK"]) for e in environments] == list(range(16))


def test_ports_of_jobs_and_steps_differ_and_stay_below_the_ephemeral_ones():
    ports = [
        int(slurm_environment({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"])
        for job in range(4211, 4311)
        for step in range(3)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 1024
    assert max(ports) < 32768


def test_inside_an_allocation_but_outside_a_step_there_is_one_process():
    batch = {name: value for name, value in STEP.items() if "STEP" not in name}
    assert ranks_from_environment(batch) == Ranks(0, 0, 1)
    shell = {**STEP, "SLURM_STEP_NUM_TASKS": "1"}  # srun --pty bash
    assert ranks_from_environment(shell) == Ranks(0, 0, 1)


def test_torchrun_inside_a_step_wins():
    """One task per node, each with a torchrun: srun's numbers are the nodes', not the ranks'."""
    environ = {**STEP, "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "here"}
    assert ranks_from_environment(environ) == Ranks(5, 1, 8)
    before = dict(environ)
    complete_environment(environ)
    assert environ == before


def test_what_srun_leaves_out_is_added_and_what_is_there_wins():
    environ = {**STEP, "MASTER_PORT": "29999"}
    complete_environment(environ)
    assert environ["MASTER_PORT"] == "29999"
    assert environ["MASTER_ADDR"] == "gpu03"
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("11", "3", "16")


def test_a_step_whose_variables_make_no_sense_is_one_clear_error():
    with pytest.raises(MachineError, match="Slurm job step"):
        slurm_environment({**STEP, "SLURM_JOB_ID": "x"})
    with pytest.raises(MachineError, match="SLURM_PROCID"):
        ranks_from_environment({n: v for n, v in STEP.items() if n != "SLURM_PROCID"})


def test_under_srun_no_further_workers_are_started():
    from burnish.config.schema import LaunchConfig

    assert num_workers(LaunchConfig(num_processes=4), STEP) == 1
    shell = {**STEP, "SLURM_STEP_NUM_TASKS": "1"}
    assert num_workers(LaunchConfig(num_processes=4), shell) == 4


def test_the_deepspeed_launcher_s_flag_is_dropped():
    argv = ["--local_rank=1", "train", "sft.yaml", "--optim.lr", "2e-5"]
    assert without_launcher_flags(argv) == argv[1:]


def test_a_rank_that_never_comes_ends_the_wait(monkeypatch):
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match="rank 0 of 2 could not join"):
        start_process_group(Ranks(0, 0, 2), torch.device("cpu"), timeout_seconds=2.0)
