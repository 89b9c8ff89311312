"""Kill a run at random instants, over and over, and see that it ends as if nothing had happened.

    python bench/chaos.py --kills 20

A tiny job trains once undisturbed. Then it is started again and again in another folder and killed
(SIGKILL, the whole process group) after a random time, at least `--kills` times, until it is done. Losses,
gradient norms and final weights have to be equal to the bit, and every checkpoint that stands has to verify.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from safetensors.torch import load_file

from cluster.tiny_job import ENVIRONMENT, write_tiny_job


def main() -> None:
    """Parse, run, compare; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--processes", type=int, default=1, help="ranks; more than one is DeepSpeed")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--spread", type=float, default=1.0, help="most seconds between progress and kill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="burnish-chaos-") as folder:
        sys.exit(0 if try_all(Path(folder), options) else 1)


def try_all(folder: Path, options: argparse.Namespace) -> bool:
    """Whether the run that was killed ended like the one that was not."""
    chance = random.Random(options.seed)
    job = write_tiny_job(folder / "job")
    flags = ["--train.max_steps", options.steps, "--checkpoint.every_steps", 3, "--checkpoint.resume", "auto"]
    flags += ["--launch.num_processes", options.processes, "--engine.zero_stage", options.zero_stage]
    whole, killed = folder / "whole", folder / "killed"
    if start(job, flags, whole).wait() != 0:
        print("the undisturbed run failed")
        return False

    num_kills, num_damaged, code = 0, 0, None
    while code is None:
        process, before = start(job, flags, killed), last_step(killed)
        while num_kills < options.kills and process.poll() is None and last_step(killed) <= before:
            time.sleep(0.02)
        # Somewhere in the next steps, saves and prunings; once there were enough kills, it may finish.
        patience = chance.uniform(0.0, options.spread) if num_kills < options.kills else None
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            num_kills += 1
            num_damaged += verify(killed) != 0
            print(f"kill {num_kills}: at step {last_step(killed)}", flush=True)
    same = code == 0 and numbers(killed) == numbers(whole) and weights_equal(killed, whole)
    print(f"{num_kills} kills, {num_damaged} damaged checkpoints, exit code {code}, equal to the bit: {same}")
    return same and num_damaged == 0


def start(job: Path, flags: list[object], out: Path) -> subprocess.Popen[bytes]:
    """Start training in a process group of its own."""
    command = [sys.executable, "-m", "burnish", "train", str(job), *map(str, flags), "--output_dir", str(out)]
    return subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def verify(run_dir: Path) -> int:
    """Exit code of `burnish ckpt verify`; nothing to verify is well."""
    if not (run_dir / "checkpoints").exists():
        return 0
    command = [sys.executable, "-m", "burnish", "ckpt", "verify", str(run_dir)]
    return subprocess.run(
        command, check=False, env={**os.environ, **ENVIRONMENT}, capture_output=True
    ).returncode


def numbers(run_dir: Path) -> list[tuple[float, ...]]:
    """What must be equal, step by step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in rows if r["kind"] == "train"]


def last_step(run_dir: Path) -> int:
    """The last step that was written down before the kill."""
    file = run_dir / "metrics.jsonl"
    rows = (
        [line for line in file.read_text().splitlines() if line.startswith('{"kind": "train"')]
        if file.exists()
        else []
    )
    try:
        return int(json.loads(rows[-1])["step"]) if rows else 0
    except json.JSONDecodeError:  # the kill came in the middle of a line
        return int(json.loads(rows[-2])["step"]) if len(rows) > 1 else 0


def weights_equal(one: Path, other: Path) -> bool:
    """Whether the final weights are equal to the bit."""
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(bool((ours[n] == theirs[n]).all()) for n in ours)


if __name__ == "__main__":
    main()
