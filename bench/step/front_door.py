"""The same through the front door: `burnish train` on rows of text, with its data path, logging and export.

Two questions. Does a step ever wait for its data? And what does ZeRO-2 on two ranks cost, against two plain
data-parallel processes with the same kernels?
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step.cases import MODELS, python_path

BENCH = Path(__file__).parents[1]
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2}
"""So small that an example takes a few milliseconds: what is not the model's own time would show."""


def stage(folder: Path, model: str, rows: Sequence[Mapping[str, str]], tokenizer: Any, small: bool) -> None:
    """A model folder with its tokenizer, and the rows as JSON lines."""
    keys = dict(MODELS[model]) | (SMALL | {"num_key_value_heads": 2} if small else {})
    keys["vocab_size"] = max(keys["vocab_size"], -(-len(tokenizer) // 64) * 64)
    (folder / "model").mkdir()
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(keys))
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def train(folder: Path, flags: Sequence[str], python_threads: int | None = None) -> dict[str, Any]:
    """Run `burnish train`; its metrics lines, and seconds from the first step's line to the last one's."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    base = {
        "model.path": folder / "model",
        "model.init": "random",
        "data.train": folder / "rows.jsonl",
        "data.bad_rows": "drop",
        "data.max_bad_fraction": 1,
        "batch.global_examples": 8,
        "optim.lr": 1e-4,
        "output_dir": run,
    }
    command = [sys.executable, "-m", "burnish", "train"]
    command += [part for key, value in base.items() for part in (f"--{key}", str(value))]
    env = {**os.environ, "PYTHONPATH": python_path()}
    if python_threads is not None:
        env["OMP_NUM_THREADS"] = str(python_threads)
    started = time.perf_counter()
    with (folder / "train.log").open("w+") as log:
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log, env=env)
        first = last = 0.0
        size = 0
        while process.poll() is None:
            time.sleep(0.02)
            path = run / "metrics.jsonl"
            now, grown = time.perf_counter(), path.stat().st_size if path.exists() else 0
            # Of the file only what was added is read: this must not take the trainer's time.
            if grown > size and _has_step(path, size):
                first, last = first or now, now
            size = grown
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read()[-4000:])
    lines = _steps(run / "metrics.jsonl")
    return {"lines": lines, "all_seconds": time.perf_counter() - started, "loop_seconds": last - first}


def _has_step(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return b'"kind": "train"' in file.read()


def _steps(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    texts = path.read_text("utf-8").splitlines(keepends=True)
    lines = [json.loads(text) for text in texts if text.endswith("\n")]
    return [line for line in lines if line["kind"] == "train"]


def time_split(done: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of the loop's time from the first step to the last; `between` is what no step counted:
    planning the next window, writing metrics."""
    lines = done["lines"][1:]
    phases = {name: sum(line["phase_seconds"][name] for line in lines) for name in lines[0]["phase_seconds"]}
    loop = done["loop_seconds"]
    phases["between"] = loop - sum(phases.values())
    return {
        "steps": len(done["lines"]),
        "examples": sum(line["num_examples"] for line in done["lines"]),
        "loop_seconds": loop,
        "whole_seconds": done["all_seconds"],
        "tokens_per_second": sum(line["num_tokens"] for line in lines) / loop,
        "shares": {name: seconds / loop for name, seconds in phases.items()},
        "longest_wait_seconds": max(line["phase_seconds"]["data"] for line in lines),
    }


def zero_cost(folder: Path, num_rounds: int) -> dict[str, Any]:
    """Median step of ZeRO-2 over that of plain data parallel, two ranks each, in turn."""
    kinds = {"local": ["--engine.kind", "local"], "zero-2": ["--engine.kind", "deepspeed"]}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(num_rounds):
        for name, flags in kinds.items():
            done = train(folder, [*flags, "--launch.num_processes", "2", "--train.max_steps", "10"], 1)
            seconds[name].append(statistics.median(line["seconds"] for line in done["lines"][2:]))
            print(f"two ranks, {name}: {seconds[name][-1]:.3f} s a step", flush=True)
    ratios = [z / plain for z, plain in zip(seconds["zero-2"], seconds["local"], strict=True)]
    return {
        "seconds": seconds,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }
