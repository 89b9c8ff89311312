"""What the program reads and prints, wherever that leads: to a terminal, a pipe, or nowhere."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from burnish.errors import EXIT_DONE


def settle_streams() -> None:
    """Streams that take whatever is printed: what was closed when the program started leads nowhere, and a
    letter that stdout cannot write (another locale, a file name that is not UTF-8) comes out as its number.

    Without the first Python has None there: a flush is an error, and what is meant for stderr goes to stdout.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)  # or the next file would be opened there, and libraries print into it
                os.close(opened)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Output whose reader went away (`| head`) in the block ends the program quietly: who left had enough.

    What is printed is flushed before the block ends. Left to Python's own end, a closed pipe would be a
    message on stderr and exit code 120.
    """
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        _end_quietly()
    except SystemExit as end:
        # rich's console makes exit code 1 of it.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        _end_quietly()


def _end_quietly() -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
    sys.exit(EXIT_DONE)
