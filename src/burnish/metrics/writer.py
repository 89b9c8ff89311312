"""Writes what the training loop reports, once, on rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO, final

from burnish.errors import MachineError, writing
from burnish.metrics.console import ConsoleProgress
from burnish.metrics.lines import cut_after, eval_line, to_json, train_line
from burnish.metrics.trackers import Tracker, in_words, make_tracker
from burnish.records import EvalStats, StepStats
from burnish.runtime import Ranks, log

METRICS_NAME = "metrics.jsonl"

_PLOTTED = ("epoch", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "seconds")


@final
class MetricsWriter:
    """Takes steps, evaluations and events; writes `metrics.jsonl`, the console and the trackers.

    On other ranks than 0 it does nothing. The event `{"kind": "resume", "step": n}` cuts the file
    after step n, so that no step stands there twice (with `"eval_due": true` before n's
    evaluation, which is still to come); without it, or with `"from_own": false` (from another
    folder's checkpoint), an older run's file is set aside as `metrics-1.jsonl` when the first
    line comes.

    Args:
        run_dir: The run's folder.
        trackers: Names from `log.trackers`.
        ranks: This process among the others.
        num_steps: Optimizer steps of the whole run, for the bar.
        run_config: The resolved config, for trackers that keep one. It never holds a secret.

    Raises:
        MachineError: By the first line: a tracker's package is not installed, or it cannot be started.
    """

    def __init__(
        self,
        run_dir: Path,
        trackers: Sequence[str],
        ranks: Ranks,
        *,
        num_steps: int,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._is_main = ranks.is_main
        self._run_dir = run_dir
        self._names = tuple(trackers)
        self._run_config = dict(run_config or {})
        self._file: TextIO | None = None
        self._early: list[Mapping[str, Any]] = []
        self._console = ConsoleProgress(num_steps)
        self._trackers: dict[str, Tracker] = {}

    def train(self, stats: StepStats) -> None:
        """One logged optimizer step."""
        if not self._is_main:
            return
        line = train_line(stats)
        self._write(line)
        numbers = {f"train/{name}": line[name] for name in _PLOTTED if line[name] is not None}
        self._track(stats.step, numbers)
        self._console.train(stats)

    def eval(self, stats: EvalStats) -> None:
        """One evaluation."""
        if not self._is_main:
            return
        self._write(eval_line(stats))
        numbers = {"eval/loss": stats.loss, "eval/perplexity": stats.perplexity}
        numbers |= {f"eval/{name}/loss": values["loss"] for name, values in stats.sources.items()}
        self._track(stats.step, numbers)
        self._console.eval(stats)

    def event(self, event: Mapping[str, Any]) -> None:
        """Anything else worth a line; it has a `kind`, and a `step` where it belongs to one."""
        if not self._is_main:
            return
        if event.get("kind") == "resume":
            own = bool(event.get("from_own", True))
            self._begin(int(event["step"]), bool(event.get("eval_due")), own)
        if self._file is None:  # whether this run goes on or starts anew is not known yet
            self._early.append(event)
        else:
            self._write(event)

    def close(self) -> None:
        """Flush everything. No call may follow."""
        if not self._is_main:
            return
        if self._early:
            self._begin(None)
        self._console.close()
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.close)
        if self._file is not None:
            with writing(self._run_dir / METRICS_NAME):  # tries again what a full disk did not take
                self._file.close()

    def _begin(self, resumed_step: int | None, eval_due: bool = False, own: bool = True) -> None:
        if self._file is not None:
            return
        path = self._run_dir / METRICS_NAME
        with writing(path):
            self._run_dir.mkdir(parents=True, exist_ok=True)
            if resumed_step is not None and own:
                cut_after(path, resumed_step, eval_due)
            elif path.exists() and path.stat().st_size > 0:
                path.replace(_free_name(path))
        for name in self._names:
            self._trackers[name] = make_tracker(name, self._run_dir, self._run_config, resumed_step)
        with writing(path):
            self._file = path.open("a", encoding="utf-8")
        early, self._early = self._early, []
        for event in early:
            self._write(event)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._begin(None)
        assert self._file is not None
        with writing(self._run_dir / METRICS_NAME):
            if os.fstat(self._file.fileno()).st_nlink == 0:  # somebody removed it, with the folder perhaps
                self._file.close()
                self._run_dir.mkdir(parents=True, exist_ok=True)
                self._file = (self._run_dir / METRICS_NAME).open("a", encoding="utf-8")
            self._file.write(to_json(line) + "\n")
            self._file.flush()  # whoever watches the file sees every step; a crash loses none

    def _track(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, step, numbers))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """Call a tracker; one that fails is told of and left out. Hours of training are not for a server that
        went away: `metrics.jsonl` has every number."""
        try:
            with in_words(name):
                call()
        except MachineError as error:
            del self._trackers[name]
            log.warning("%s is left out from here on; metrics.jsonl has every number. %s", name, error)


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free
