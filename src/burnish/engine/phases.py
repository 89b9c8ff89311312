"""How a step's time splits into forward and backward, without making the host wait for the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, final

import torch

Phase = Literal["forward", "backward"]


@final
class PhaseClock:
    """Adds up the time of each phase over the micro-batches of a step.

    On a CPU by the host's clock. On CUDA the host only queues the work: there two events are recorded around
    each phase (microseconds, no waiting) and read in `take`.

    Args:
        device: Where the phases run.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[Phase, float] = {}
        self._events: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What runs inside counts as this phase."""
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[Phase, float]:
        """Seconds of each phase since the last call.

        To be called after the host has read something that comes after the phases (the norm of the
        gradients): then every event has passed, and reading them does not wait. An event that has not
        passed all the same is left out.
        """
        for name, begin, end in self._events:
            if end.query():
                self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        taken, self._seconds, self._events = self._seconds, {}, []
        return taken
