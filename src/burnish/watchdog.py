"""Ends a run that hangs, within a stated time and with every rank's stack saved.

A rank that waits for another one in a collective waits for the process group's timeout, half an
hour, and says nothing. So every rank watches itself: it beats once per micro-batch, and all ranks
beat alike, because they meet in every step. How long a failure lasts:

- a rank that stops making progress: `launch.hang_timeout_seconds`, then every rank, each by its own
  watch, saves its stacks in `stacks/rank-N.txt` and ends with exit code 75 (try again later);
  `STUCK_SECONDS` more for a rank that hangs in native code without letting Python run;
- a rank that dies: its launcher asks the others to stop; what does not stop within
  `ASKED_SECONDS` saves its stacks, and the launcher kills it (after 60 s, torchrun and the
  deepspeed launcher after 30 s). Ranks on hosts that no launcher reaches end as hanging ones do.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO, final

from burnish.errors import EXIT_TRY_AGAIN, BurnishError
from burnish.runtime import Ranks

ASKED_SECONDS = 10.0
"""A rank that was asked to stop and has not finished a micro-batch for so long saves its stacks:
well before any launcher kills it."""
STUCK_SECONDS = 30.0
"""So much later than the timeout a watch that needs no Python ends the process (exit code 1)."""
_REARM_SECONDS = 1.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stacks_path(run_dir: Path, rank: int) -> Path:
    """Where a rank's stacks are saved when it hangs or fails."""
    return run_dir / "stacks" / f"rank-{rank}.txt"


@final
class Watchdog:
    """While entered, ends this process when `beat` is not called for `timeout_seconds`.

    Also saves what a failure leaves: the traceback of an exception that is not the user's to mend,
    and the stacks at a fatal signal. A file without content is removed at the end.

    Args:
        run_dir: The run's folder; stacks go to `stacks/rank-N.txt` in it, after what is there.
        ranks: This process among the others.
        timeout_seconds: Longest time between beats; None watches nothing, but still saves.
        end_process: Called with the exit code; tests put something gentler here.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: Ranks,
        timeout_seconds: float | None,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self.path = stacks_path(run_dir, ranks.rank)
        self._ranks = ranks
        self._timeout_seconds = timeout_seconds
        self._end_process = end_process
        self._last_beat = self._last_armed = time.monotonic()
        self._doing = "starting"
        self._asked_at: float | None = None
        self._open = contextlib.ExitStack()
        self._file: TextIO

    def beat(self, doing: str) -> None:
        """This rank makes progress. After the block, as where what failed to export is saved, nobody watches.

        Args:
            doing: What it does next; the report of a hang begins with it.
        """
        self._last_beat = time.monotonic()
        self._doing = doing
        rested_seconds = self._last_beat - self._last_armed
        if self._timeout_seconds is not None and rested_seconds > _REARM_SECONDS and not self._file.closed:
            self._arm()

    def __enter__(self) -> Watchdog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open.enter_context(self.path.open("a", encoding="utf-8"))
        self._open.callback(_faulthandler_as_before(faulthandler.is_enabled()))
        faulthandler.enable(self._file)
        self.beat("starting")
        if self._timeout_seconds is not None:
            self._arm()
            self._open.callback(faulthandler.cancel_dump_traceback_later)
            self._start_watching()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, BurnishError | SystemExit):
            self._write_header(f"ended by {type(error).__name__}")
            self._file.writelines(traceback.format_exception(error))
            self._file.flush()
        self._open.close()
        with contextlib.suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.path.parent.rmdir()  # only when this was the last rank's

    def _arm(self) -> None:
        """Set the clock of the watch that runs without the interpreter's lock."""
        assert self._timeout_seconds is not None
        self._last_armed = time.monotonic()
        faulthandler.dump_traceback_later(self._timeout_seconds + STUCK_SECONDS, exit=True, file=self._file)

    def _start_watching(self) -> None:
        """Start the thread. Signals reach it through a pipe that the interpreter's C handler fills
        at once, even while the main thread sits in a collective and can run no Python handler."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for end in (reading, writing):
            self._open.callback(os.close, end)
        if threading.current_thread() is threading.main_thread():
            before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            self._open.callback(signal.set_wakeup_fd, before)
        thread = threading.Thread(target=self._watch, args=(reading,), name="watchdog", daemon=True)
        thread.start()
        self._open.callback(thread.join)
        self._open.callback(os.write, writing, b"\0")  # no signal has the number 0: the end

    def _watch(self, reading: int) -> None:
        assert self._timeout_seconds is not None
        poll_seconds = min(1.0, self._timeout_seconds / 10)
        saved_when_asked = False
        while True:
            ready, _, _ = select.select([reading], [], [], poll_seconds)
            numbers = os.read(reading, 64) if ready else b""
            if 0 in numbers:
                return
            now = time.monotonic()
            if self._asked_at is None and any(number in _STOP_SIGNALS for number in numbers):
                self._asked_at = now
            idle_seconds = now - self._last_beat
            if idle_seconds > self._timeout_seconds:
                self._end(idle_seconds)
                return
            if self._asked_at is not None and not saved_when_asked:
                waited_seconds = now - max(self._asked_at, self._last_beat)
                if waited_seconds > ASKED_SECONDS:
                    self._save(f"asked to stop, but still busy {waited_seconds:.0f} s later")
                    saved_when_asked = True

    def _end(self, idle_seconds: float) -> None:
        self._save(f"no progress for {idle_seconds:.0f} s")
        # Not through logging: the thread that hangs may hold its lock.
        message = (
            f"Rank {self._ranks.rank} made no progress for {idle_seconds:.0f} s (last: {self._doing}); "
            f"ending the run. Stacks: {self.path}\n    Run the same command to go on from the last "
            "checkpoint; raise launch.hang_timeout_seconds if a micro-batch or a save may take longer.\n"
        )
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        self._end_process(EXIT_TRY_AGAIN)

    def _save(self, why: str) -> None:
        self._write_header(why)
        faulthandler.dump_traceback(self._file, all_threads=True)

    def _write_header(self, why: str) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._file.write(
            f"== {now} rank {self._ranks.rank} of {self._ranks.world_size}, host {socket.gethostname()}, "
            f"process {os.getpid()}: {why} (last: {self._doing})\n"
        )
        self._file.flush()


def _faulthandler_as_before(was_enabled: bool) -> Callable[[], None]:
    def restore() -> None:
        faulthandler.disable()
        if was_enabled and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)

    return restore
