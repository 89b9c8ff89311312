"""Progress for people: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any, final

from burnish.records import EvalStats, StepStats
from burnish.runtime import log

PLAIN_LINE_SECONDS = 2.0
"""Plain lines come at most this often, besides the first and the last step."""


@final
class ConsoleProgress:
    """Shows step, loss, learning rate, tokens/s and time left.

    Args:
        num_steps: Optimizer steps of the whole run.
        live: Draw a bar; None does where stderr is a terminal.
    """

    def __init__(self, num_steps: int, live: bool | None = None) -> None:
        self._num_steps = num_steps
        self._live = sys.stderr.isatty() if live is None else live
        self._bar: Any = None
        self._task: Any = None
        self._line_at = -PLAIN_LINE_SECONDS
        self._seconds_per_step = 0.0

    def train(self, stats: StepStats) -> None:
        """Show one step."""
        self._pace(stats)
        text = (
            f"loss {stats.loss:.4f}  lr {stats.lr:.3g}  "
            f"{stats.tokens_per_second:,.0f} tokens/s{'' if stats.applied else '  SKIPPED'}"
        )
        if self._live:
            self._draw(stats.step, text)
            return
        now = time.monotonic()
        ends = stats.step in (1, self._num_steps) or not stats.applied
        if ends or now - self._line_at >= PLAIN_LINE_SECONDS:
            self._line_at = now
            left = _clock((self._num_steps - stats.step) * self._seconds_per_step)
            log.info("step %d/%d  %s  %s left", stats.step, self._num_steps, text, left)

    def eval(self, stats: EvalStats) -> None:
        """Show one evaluation."""
        text = f"evaluation at step {stats.step}: loss {stats.loss:.4f}, perplexity {stats.perplexity:.4g}"
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            log.info("%s", text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _pace(self, stats: StepStats) -> None:
        """A running mean, so that one slow step (a save, an evaluation) does not scare anybody."""
        old = self._seconds_per_step
        self._seconds_per_step = 0.9 * old + 0.1 * stats.seconds if old else stats.seconds

    def _draw(self, step: int, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TextColumn("{task.fields[left]} left"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(text, total=self._num_steps, left="?")
            self._bar.start()
        left = _clock((self._num_steps - step) * self._seconds_per_step)
        self._bar.update(self._task, completed=step, description=text, left=left)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
