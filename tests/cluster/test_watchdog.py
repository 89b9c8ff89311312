"""A process that stops beating ends in the stated time, with its stacks saved."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from burnish.errors import DataError
from burnish.runtime import Ranks
from burnish.watchdog import Watchdog, stacks_path

ALONE = Ranks(0, 0, 1)


def program(body, tmp_path):
    """Run a script with a watchdog `dog` (2 s) on rank 3 of 4; returns exit code, stderr, seconds."""
    indented = "\n".join("    " + line for line in body.strip().splitlines())
    source = (
        "import time, signal, os, threading\nfrom pathlib import Path\n"
        "from burnish import watchdog\nfrom burnish.runtime import Ranks\n"
        "watchdog.STUCK_SECONDS = watchdog.ASKED_SECONDS = 1.0\n"
        "def wait_for_a_dead_rank(seconds=60):\n    time.sleep(seconds)\n"
        f"with watchdog.Watchdog(Path({str(tmp_path)!r}), Ranks(3, 1, 4), 2.0) as dog:\n{indented}\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr, time.monotonic() - started


def test_a_hang_ends_with_75_and_stacks(tmp_path):
    code, stderr, seconds = program("dog.beat('step 7')\nwait_for_a_dead_rank()", tmp_path)
    assert code == 75
    assert seconds < 20
    assert "Rank 3 made no progress" in stderr
    assert "step 7" in stderr
    stacks = stacks_path(tmp_path, 3).read_text()
    assert "rank 3 of 4" in stacks
    assert "no progress for 2 s (last: step 7)" in stacks
    assert "in wait_for_a_dead_rank" in stacks


def test_beats_keep_it_alive(tmp_path):
    code, stderr, _ = program("for i in range(8):\n    dog.beat('x')\n    time.sleep(0.5)", tmp_path)
    assert (code, stderr) == (0, "")
    assert not (tmp_path / "stacks").exists()


def test_a_beat_after_the_end_is_no_error(tmp_path, monkeypatch):
    """What could not be exported is saved after the block, by an engine that still tells of it."""
    monkeypatch.setattr("burnish.watchdog._REARM_SECONDS", -1.0)
    with Watchdog(tmp_path, ALONE, 60.0) as dog:
        dog.beat("training")
    dog.beat("saving")


def test_a_hang_that_lets_no_python_run_ends_too(tmp_path):
    """A library that never gives up the interpreter's lock: PyDLL calls keep it."""
    code, _, seconds = program("import ctypes\nctypes.PyDLL(None).sleep(60)", tmp_path)
    assert code == 1
    assert seconds < 20
    assert "Timeout" in stacks_path(tmp_path, 3).read_text()


def test_a_rank_asked_to_stop_that_cannot_saves_its_stacks(tmp_path):
    """SIGTERM from a launcher after another rank's death, while this one sits in a collective."""
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "end = time.monotonic() + 1.8\n"
        "while time.monotonic() < end:\n    wait_for_a_dead_rank(0.1)"
    )
    code, _, _ = program(body, tmp_path)
    assert code == 0  # it went on in the end: saving stacks ends nothing
    stacks = stacks_path(tmp_path, 3).read_text()
    assert "asked to stop" in stacks
    assert "in wait_for_a_dead_rank" in stacks


def test_a_crash_in_native_code_leaves_stacks(tmp_path):
    code, _, _ = program("def crash():\n    os.kill(os.getpid(), signal.SIGSEGV)\ncrash()", tmp_path)
    assert code == -signal.SIGSEGV
    assert "in crash" in stacks_path(tmp_path, 3).read_text()


def test_an_exception_leaves_its_traceback_and_a_user_s_error_does_not(tmp_path):
    with pytest.raises(RuntimeError), Watchdog(tmp_path, ALONE, None):
        raise RuntimeError("Connection closed by peer")
    assert "Connection closed by peer" in stacks_path(tmp_path, 0).read_text()
    other = tmp_path / "other"
    with pytest.raises(DataError), Watchdog(other, ALONE, 60.0):
        raise DataError("the user's to mend")
    assert list(other.iterdir()) == []


def open_files():
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_everything_is_as_before_afterwards(tmp_path):
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    descriptors = open_files()
    with Watchdog(tmp_path, ALONE, 60.0) as dog:
        dog.beat("anything")
    assert open_files() == descriptors
    assert signal.set_wakeup_fd(before) == before
