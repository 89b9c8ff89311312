"""One of two ranks that train the toy; after step 2 rank 1 fails in the way asked for.

`python failing_worker.py OUT_DIR hang|native|die|raise|cut TIMEOUT_SECONDS`
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from burnish.records import StepStats
from burnish.runtime import pick_device, ranks_from_environment, setup_logging, start_process_group
from burnish.train.loop import train
from rig.runs import Memory, make_job
from rig.toy import toy_config


def sleep_in_a_lock_held_by_nobody() -> None:
    time.sleep(1000)


def fail(how: str, out_dir: Path) -> None:
    (out_dir / "failed").touch()  # the tests count from here
    if how == "hang":
        sleep_in_a_lock_held_by_nobody()
    elif how == "native":
        # For another thread: woken by one, this would give the interpreter's lock away for a moment.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        ctypes.PyDLL(None).sleep(1000)  # keeps that lock
    elif how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "cut":  # this host's cable is pulled: nobody is told
        subprocess.run(["ip", "link", "set", os.environ["GLOO_SOCKET_IFNAME"], "down"], check=True)
        return
    raise RuntimeError("this rank's disk is gone")


@dataclass
class FailingMemory(Memory):
    how: str = ""
    out_dir: Path = Path()

    def train(self, stats: StepStats) -> None:
        super().train(stats)
        if stats.step == 2:
            fail(self.how, self.out_dir)


def main() -> None:
    out_dir, how = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    ranks = ranks_from_environment()
    setup_logging(ranks)
    start_process_group(ranks, pick_device(ranks))
    settings = {"engine.kind": "local", "launch.hang_timeout_seconds": float(sys.argv[3])}
    job = make_job(toy_config(out_dir, settings), ranks)
    train(replace(job, recorder=FailingMemory(how=how, out_dir=out_dir)) if ranks.rank == 1 else job)


if __name__ == "__main__":
    main()
