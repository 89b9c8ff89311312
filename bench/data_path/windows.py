"""Order, windows, packing and balance: of millions of examples, and of real lengths."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from burnish.config.schema import BatchConfig, DataConfig, TrainConfig
from burnish.data.count import count_windows
from burnish.data.pack import imbalance, least_micro_batches, pack_window
from burnish.data.windows import plan_windows
from burnish.plan import CostModel, MicroBudget
from data_path.rows import MAX_TOKENS, as_messages, tokenizer_for

NUM_RANKS = 8
SCRIPT = Path(__file__).parents[1] / "data.py"


def bench_planning(num: int) -> dict[str, Any]:
    """Plan `num` examples of two sources in this process; seconds by part, and its peak memory."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.3, 0.9, num), 2, MAX_TOKENS).astype(np.int64)
    counts = SimpleNamespace(  # what windows are planned from: numbers, no tokens
        num_tokens=lengths,
        total_weight=lengths * 0.8,
        num_supervised=(lengths * 0.8).astype(np.int64),
        source_ids=(np.arange(num) % 10 == 0).astype(np.int32),
        source_names=("a", "b"),
    )
    before = _peak_bytes()
    sources = [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]
    data = DataConfig.model_validate({"train": sources, "mix": "weighted", "max_tokens": MAX_TOKENS})
    batch = BatchConfig(global_examples=NUM_RANKS * 256, micro_tokens=16384)
    start = time.perf_counter()
    start_cpu = time.process_time()
    windows = plan_windows(counts, data, batch, TrainConfig(), NUM_RANKS, packed=True)
    windows.epoch_order(0)
    ordered = time.perf_counter()
    found = count_windows(windows, counts)
    counted = time.perf_counter()
    cpu_seconds = time.process_time() - start_cpu
    sample = np.linspace(1, windows.num_steps, 200).astype(int).tolist()
    for step in sample:
        windows.window(step)
    return {
        "examples": num,
        "steps": windows.num_steps,
        "order_and_windows_seconds": ordered - start,
        "packing_and_balance_seconds": counted - ordered,
        "seconds": counted - start,
        "cpu_seconds": cpu_seconds,
        "one_window_seconds": (time.perf_counter() - counted) / len(sample),
        "peak_bytes": _peak_bytes(),
        "peak_bytes_before": before,
        "least_share": found.least_micro_batches_share,
        "imbalance_mean": found.imbalance_mean,
        "imbalance_max": found.imbalance_max,
    }


def _peak_bytes() -> int:
    """Most memory that this process has had in use."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be the parent's where that was larger
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def planning_apart(num: int) -> dict[str, Any]:
    """`bench_planning` in a fresh process, whose peak memory is nobody else's."""
    command = [sys.executable, str(SCRIPT), "--planning-only", str(num)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def bench_packing(rows: Sequence[Mapping[str, str]], folder: str | None) -> dict[str, Any]:
    """How windows of these rows are packed over 8 ranks, for several sizes of window and forward."""
    tokenizer = tokenizer_for(folder, rows)
    distinct = list({json.dumps(row): row for row in rows}.values())
    texts = [str(tokenizer.apply_chat_template(as_messages(row), tokenize=False)) for row in distinct]
    sizes = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]  # type: ignore
    lengths = np.minimum(np.array(sizes, np.int64), MAX_TOKENS)
    found = {}
    for per_window, micro_tokens in ((256, 4096), (256, 8192), (NUM_RANKS * 256, 8192)):
        found[f"{per_window} examples, {micro_tokens} tokens"] = _pack_many(lengths, per_window, micro_tokens)
    return {"distinct_rows": len(distinct), "mean_tokens": float(lengths.mean()), "windows": found}


def _pack_many(lengths: np.ndarray, per_window: int, micro_tokens: int, num: int = 200) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    budget, cost = MicroBudget(micro_tokens, None), CostModel()
    excess, extra, fill = [], [], []
    for _ in range(num):
        window = rng.choice(lengths, per_window, replace=True)
        cuts = pack_window(window, NUM_RANKS, budget, cost)
        excess.append(imbalance(window, cuts, cost))
        extra.append(len(cuts[0]) - least_micro_batches(window, NUM_RANKS, budget))
        fill.append(window.sum() / (NUM_RANKS * len(cuts[0]) * micro_tokens))
    return {
        "windows": num,
        "least_share": extra.count(0) / num,
        "most_extra": max(extra),
        "imbalance_mean": float(np.mean(excess)),
        "imbalance_max": float(np.max(excess)),
        "fill": float(np.mean(fill)),
    }
