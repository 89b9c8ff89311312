"""How far preparing data is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

log = logging.getLogger("burnish")

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]
"""Called with the number of rows that are done since the last call."""


@contextlib.contextmanager
def progress(what: str, num_rows: int | None) -> Iterator[Advance]:
    """Show progress while the context is open.

    Args:
        what: What is being done.
        num_rows: About how many rows there are; None where nobody knows.
    """
    if not sys.stderr.isatty():
        yield _lines(what, num_rows)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=num_rows)
        yield lambda count: bar.advance(task, count)


def _lines(what: str, num_rows: int | None) -> Advance:
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal last, done
        done += count
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            share = f" of about {num_rows:,}" if num_rows else ""
            log.info("%s: %s rows%s, %.0f rows/s", what, f"{done:,}", share, done / (now - start))

    return advance
