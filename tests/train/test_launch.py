"""Workers: their environment, their exit codes, their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from burnish import launch as launching
from burnish.config.schema import LaunchConfig
from burnish.errors import ConfigError
from burnish.launch import launch, num_workers, threads_per_worker

PYTHON = sys.executable


def run(code: str, num_processes: int = 2, grace_seconds: float = 5.0) -> int:
    return launch(num_processes, [PYTHON, "-c", code], grace_seconds)


def test_environment_is_torchruns(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    code = (
        "import os, pathlib\n"
        f"values = [os.environ[n] for n in {names!r}.split()]\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(' '.join(values))"
    )
    assert run(code) == 0
    first, second = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert first[:5] == ["0", "0", "2", "2", "127.0.0.1"]
    assert second[:2] == ["1", "1"]
    assert first[5] == second[5]


def test_cores_are_divided() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_worker(1) == cores
    assert threads_per_worker(10 * cores) == 1


@pytest.mark.parametrize(("how", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_one_failure_ends_all_with_its_code(how: str, code: int) -> None:
    started = time.monotonic()
    program = f"import os, sys, time\nif os.environ['RANK'] == '1': {how}\ntime.sleep(60)"
    assert run(program) == code
    assert time.monotonic() - started < 30


def test_a_worker_that_does_not_listen_is_killed() -> None:
    program = (
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1': time.sleep(1); sys.exit(2)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    assert run(program, grace_seconds=1.0) == 2
    assert time.monotonic() - started < 30


def test_signals_are_passed_on(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\n"
        "time.sleep(60)"
    )

    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    assert run(program) == 143


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_workers_stop_when_the_launcher_is_killed(tmp_path: Path) -> None:
    """They would go on training, and the same command, started again, would train beside them."""
    worker = (
        "import os, pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(*_):\n"
        "    (folder / ('stopped' + os.environ['RANK'])).touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(folder / os.environ['RANK']).touch()\n"
        "time.sleep(60)"
    )
    code = f"from burnish.launch import launch; launch(2, [{PYTHON!r}, '-c', {worker!r}])"
    launcher = subprocess.Popen([PYTHON, "-c", code])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    while len(list(tmp_path.glob("stopped*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.glob("stopped*"))) == 2


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_workers(LaunchConfig(num_processes=3), {}) == 3
    assert num_workers(LaunchConfig(num_processes=3), {"RANK": "0", "WORLD_SIZE": "1"}) == 1
    assert num_workers(LaunchConfig(num_processes=3), {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}) == 1
    assert num_workers(LaunchConfig(), {}) >= 1


def test_no_more_workers_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would end them with a traceback: duplicate GPU detected."""
    for gpus, count in ((0, 4), (1, 1), (2, 2), (4, 2)):
        monkeypatch.setattr(launching, "num_gpus", lambda gpus=gpus: gpus)
        assert num_workers(LaunchConfig(num_processes=count), {}) == count
    monkeypatch.setattr(launching, "num_gpus", lambda: 1)
    with pytest.raises(ConfigError, match=r"launch.num_processes: is 2, with 1 GPU here"):
        num_workers(LaunchConfig(num_processes=2), {})
