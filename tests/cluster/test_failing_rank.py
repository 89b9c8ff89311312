"""A rank that hangs or dies in the middle of real training ends the whole run, with stacks, in time."""

import os
import sys
import time
from pathlib import Path

import pytest
from hosts import two_hosts

from burnish import watchdog
from burnish.launch import launch
from burnish.watchdog import stacks_path

HANG_SECONDS = 5.0
SLACK_SECONDS = 15.0
"""Polling, saving stacks and ending two processes, on a busy machine."""
LIMIT_SECONDS = 240
TESTS = Path(__file__).resolve().parent.parent


def worker(out_dir, how):
    script = str(Path(__file__).with_name("failing_worker.py"))
    # Who raises or dies is not waited for, so a slow step on a busy machine need not count as a hang.
    hang_seconds = LIMIT_SECONDS if how in ("raise", "die") else HANG_SECONDS
    return [sys.executable, script, str(out_dir), how, str(hang_seconds)]


def seconds_since_failure(out_dir):
    return time.time() - (out_dir / "failed").stat().st_mtime


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture
def run(tmp_path):
    def run(how, grace_seconds=20.0):
        argv = worker(tmp_path, how)
        code = launch(2, argv, grace_seconds)
        return code, seconds_since_failure(tmp_path), [stacks_path(tmp_path, rank) for rank in range(2)]

    return run


def test_a_rank_that_hangs(run):
    code, seconds, stacks = run("hang")
    assert code == 75
    assert seconds < HANG_SECONDS + SLACK_SECONDS
    assert "in sleep_in_a_lock_held_by_nobody" in stacks[1].read_text()
    waiting = stacks[0].read_text()
    assert "no progress for" in waiting
    assert "all_reduce" in waiting
    assert "in train_step" in waiting


def test_a_rank_that_dies(run):
    """The other finds its connection closed, fails with a traceback, and says where it stood."""
    code, seconds, stacks = run("die")
    assert code == 137
    assert seconds < SLACK_SECONDS
    assert not stacks[1].exists() or stacks[1].read_text() == ""  # SIGKILL leaves no time to write
    assert "in train_step" in stacks[0].read_text()


@pytest.mark.slow
def test_a_rank_that_raises(run):
    code, seconds, stacks = run("raise")
    assert code == 1
    assert seconds < SLACK_SECONDS
    assert "this rank's disk is gone" in stacks[1].read_text()
    assert "in train_step" in stacks[0].read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_without_letting_python_run(run):
    code, seconds, stacks = run("native", watchdog.STUCK_SECONDS + SLACK_SECONDS)
    assert code in (1, 75)
    assert seconds < HANG_SECONDS + watchdog.STUCK_SECONDS + SLACK_SECONDS
    assert "in fail" in stacks[1].read_text()
    assert "in train_step" in stacks[0].read_text()


@pytest.mark.slow
def test_a_host_that_falls_off_the_network(tmp_path):
    """Nobody closes a connection and no launcher notices: each host's own watch ends it."""
    with two_hosts() as hosts:
        address = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29513", "WORLD_SIZE": "2"}
        processes = [
            host.start(worker(tmp_path, "cut"), {**address, "RANK": str(rank), "LOCAL_RANK": "0"})
            for rank, host in enumerate(hosts)
        ]
        outputs = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in processes]
        assert [process.returncode for process in processes] == [75, 75], outputs
        assert seconds_since_failure(tmp_path) < HANG_SECONDS + SLACK_SECONDS
    for rank in range(2):
        assert "in train_step" in stacks_path(tmp_path, rank).read_text()


MEETING = """\
import sys
from burnish import cli
from burnish.__main__ import command
from burnish.errors import MachineError, Problem
from burnish.runtime import barrier, pick_device, ranks_from_environment, start_process_group

@cli.app.command
def meet(how):
    ranks = ranks_from_environment()
    start_process_group(ranks, pick_device(ranks))
    barrier(ranks)
    if how == "together" or ranks.rank == 1:
        raise MachineError(Problem("disk", "is full", "Free some."), everywhere=how == "together")
    barrier(ranks)

sys.argv[1:] = ["meet", sys.argv[1]]
command()
"""


def test_one_ranks_error_is_not_drowned_by_what_the_others_meet(capfd):
    assert launch(2, [sys.executable, "-c", MEETING, "alone"], grace_seconds=20.0) == 4
    said = capfd.readouterr().err
    assert "[rank 1] burnish: disk: is full\n    Free some." in said
    assert "\nburnish: another rank ended, so this one does too (Connection" in said
    assert "Traceback" not in said


def test_what_all_ranks_have_to_say_is_said_once(capfd):
    assert launch(2, [sys.executable, "-c", MEETING, "together"], grace_seconds=20.0) == 4
    said = capfd.readouterr().err
    assert said.count("disk: is full") == 1
    assert "burnish: disk: is full" in said.splitlines()
