"""A rank that hangs or dies in the middle of real training ends the whole run, with stacks, in time."""

import os
import sys
import time
from pathlib import Path

import pytest

from burnish import watchdog
from burnish.launch import launch
from burnish.watchdog import stacks_path

HANG_SECONDS = 5.0
START_SECONDS = 60.0
"""Two processes import torch and transformers and train two steps: far less, on an idle machine."""
TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)

    def run(how):
        script = str(Path(__file__).with_name("failing_worker.py"))
        argv = [sys.executable, script, str(tmp_path), how, str(HANG_SECONDS)]
        started = time.monotonic()
        code = launch(2, argv, grace_seconds=20.0)
        return code, time.monotonic() - started, [stacks_path(tmp_path, rank) for rank in range(2)]

    return run


def test_a_rank_that_hangs(run):
    code, seconds, stacks = run("hang")
    assert code == 75
    assert seconds < START_SECONDS + HANG_SECONDS
    assert "in sleep_in_a_lock_held_by_nobody" in stacks[1].read_text()
    waiting = stacks[0].read_text()
    assert "no progress for" in waiting
    assert "all_reduce" in waiting
    assert "in train_step" in waiting


def test_a_rank_that_dies(run):
    """The other finds its connection closed, fails with a traceback, and says where it stood."""
    code, seconds, stacks = run("die")
    assert code == 137
    assert seconds < START_SECONDS
    assert not stacks[1].exists() or stacks[1].read_text() == ""  # SIGKILL leaves no time to write
    assert "in train_step" in stacks[0].read_text()


@pytest.mark.slow
def test_a_rank_that_raises(run):
    code, seconds, stacks = run("raise")
    assert code == 1
    assert seconds < START_SECONDS
    assert "this rank's disk is gone" in stacks[1].read_text()
    assert "in train_step" in stacks[0].read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_without_letting_python_run(run):
    code, seconds, stacks = run("native")
    assert code in (1, 75)
    assert seconds < START_SECONDS + HANG_SECONDS + watchdog.STUCK_SECONDS
    assert "in fail" in stacks[1].read_text()
    assert "in train_step" in stacks[0].read_text()
