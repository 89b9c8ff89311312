"""A signal asks the run to stop; the step in hand is finished first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import final

from burnish.runtime import log

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@final
class StopRequest:
    """While entered, SIGTERM and SIGINT set `received` instead of ending the process.

    A second signal of the same kind acts as it would have without this. Outside the main thread,
    where Python allows no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in list(self._before):
            self._restore(number)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore(self.received)
        log.warning("%s: finishing this step, then saving a checkpoint.", self.received.name)

    def _restore(self, number: signal.Signals) -> None:
        if number in self._before:
            signal.signal(number, self._before.pop(number))
