"""A racer's side of taking turns: so many steps when told to, then silence until the next turn."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch


class RaceOver(BaseException):
    """No further turn: leave whatever loop is running."""


class Turns:
    """Steps are counted and timed here; a racer's loop calls `step_done` after each.

    Args:
        answers: Where results go, one JSON object a line.
        wait: Waits until the device has done what it was given.
    """

    def __init__(self, answers: TextIO, wait: Callable[[], None]) -> None:
        self._answers = answers
        self._wait = wait
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._wanted = 0
        self._started = 0.0

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Say that everything is loaded, and wait for the first turn."""
        self._answer({"ready": True, **facts})
        self._next_turn()

    def step_done(self, loss: float | None = None, facts: Mapping[str, Any] | None = None) -> None:
        """An optimizer step has ended; blocks at the end of a turn.

        Raises:
            RaceOver: There is no further turn.
        """
        self._wait()
        self._seconds.append(time.perf_counter() - self._started)
        if loss is not None:
            self._losses.append(loss)
        if len(self._seconds) >= self._wanted:
            losses = {"first_loss": self._losses[0]} if self._losses else {}
            self._answer({"seconds": self._seconds, **losses, **(facts or {})})
            self._next_turn()
        self._started = time.perf_counter()

    def _answer(self, what: Mapping[str, Any]) -> None:
        memory = {"peak_bytes": peak_bytes(), "bytes": held_bytes()}
        self._answers.write(json.dumps({**what, **memory}) + "\n")
        self._answers.flush()

    def _next_turn(self) -> None:
        give_memory_back()  # the next racer needs it; the first step of a turn is not timed
        line = sys.stdin.readline().strip()
        if not line or line == "stop":
            raise RaceOver
        self._wanted = int(line)
        self._seconds = []
        self._started = time.perf_counter()


def private_stdout() -> TextIO:
    """The answers' channel; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def give_memory_back() -> None:
    """Return freed memory to the system, whatever the allocator was told to keep; a GPU's to the other
    racers, who are on it all the time."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def held_bytes() -> int:
    """Memory now: what tensors hold on a GPU that is in use, else what this process holds."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else _status("VmRSS")


def peak_bytes() -> int:
    """The most since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _status("VmHWM")


def forget_peak() -> None:
    """Let the peak begin at what is held now."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
