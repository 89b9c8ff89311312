"""`metrics.jsonl`: one JSON object per line, numbers as they are, no step twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from burnish.records import EvalStats, StepStats


def train_line(stats: StepStats) -> dict[str, Any]:
    """The line of a logged optimizer step, as the contract has it."""
    return {
        "kind": "train",
        "step": stats.step,
        "epoch": stats.epoch,
        "loss": stats.loss,
        "lr": stats.lr,
        "grad_norm": stats.grad_norm,
        "applied": stats.applied,
        "num_examples": stats.num_examples,
        "num_tokens": stats.num_tokens,
        "num_supervised_tokens": stats.num_supervised_tokens,
        "num_micro_batches": stats.num_micro_batches,
        "tokens_per_second": stats.tokens_per_second,
        "peak_memory_bytes": stats.peak_memory_bytes,
        "seconds": stats.seconds,
        "phase_seconds": dict(stats.phase_seconds),
    }


def eval_line(stats: EvalStats) -> dict[str, Any]:
    """The line of an evaluation, as the contract has it."""
    return {
        "kind": "eval",
        "step": stats.step,
        "loss": stats.loss,
        "perplexity": stats.perplexity,
        "num_supervised_tokens": stats.num_supervised_tokens,
        "sources": {name: dict(values) for name, values in stats.sources.items()},
        "seconds": stats.seconds,
    }


def to_json(line: Mapping[str, Any]) -> str:
    """One line of strict JSON: what is not finite becomes the string NaN or Infinity, never 0."""
    return json.dumps(_spell_out(line), allow_nan=False, ensure_ascii=False)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a metrics file; a last line that a crash cut off is left out.

    Numbers that were not finite come back as floats.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict):
                yield _read_back(line)


def cut_after(path: Path, step: int, eval_due: bool = False) -> None:
    """Leave out every line of a step after `step`, and its own evaluation where that is still to come: a
    resumed run will write those again."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line.get("step", 0) <= step]
    if eval_due:
        kept = [line for line in kept if (line.get("kind"), line.get("step")) != ("eval", step)]
    staged = path.with_name(f".{path.name}.cut")
    with staged.open("w", encoding="utf-8") as file:
        file.writelines(to_json(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _spell_out(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _spell_out(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_out(inner) for inner in value]
    return value


def _read_back(value: Any) -> Any:
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, dict):
        return {key: _read_back(inner) for key, inner in value.items()}
    return value
