"""One function over many batches, in several processes, results in the order of the batches."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from burnish.errors import MachineError, Problem

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCHES_AHEAD = 3
"""Batches per worker that are read before they are worked on; bounds the memory in use."""

_work: Callable[[Any], Any] | None = None
"""In a worker process: what it does with a batch. Set once, as the function is large to send."""


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map(work, items)`, by `num_workers` processes; with 1, in this process.

    The processes are started by a fork server (spawned where there is none), never forked from here:
    this process may hold threads, locks and a GPU.

    Args:
        work: Picklable.
        items: Read only as far ahead as the workers need.
        num_workers: 1 or more.

    Raises:
        MachineError: A worker was killed, most often for want of memory.
    """
    if num_workers == 1:
        yield from map(work, items)
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__, work.__class__.__module__, "transformers"])
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (pickle.dumps(work),))
    try:
        yield from _in_order(pool, iter(items), num_workers * BATCHES_AHEAD)
    except BrokenProcessPool as error:
        raise MachineError(
            Problem(
                "data.num_workers",
                "a process that prepares data was killed, most often for want of memory",
                f"Use fewer than {num_workers}.",
            )
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, items: Iterator[Any], num_ahead: int) -> Iterator[Any]:
    waiting: collections.deque[Future[Any]] = collections.deque()
    for item in itertools.islice(items, num_ahead):
        waiting.append(pool.submit(_do, item))
    while waiting:
        result = waiting.popleft().result()
        for item in itertools.islice(items, 1):
            waiting.append(pool.submit(_do, item))
        yield result


def _start_worker(work: bytes) -> None:
    global _work  # noqa: PLW0603 - a process has no other place for what it was started with
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers itself
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this worker is one of as many as there are cores
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = pickle.loads(work)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for batches for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)
