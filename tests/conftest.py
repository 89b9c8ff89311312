"""Fixtures and switches for every test: no network, shapes checked, few threads."""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from jaxtyping import install_import_hook

# Shapes and types of every public record and function are checked while tests run.
install_import_hook("burnish", "beartype.beartype")


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """No test's log goes where an earlier one's went: a command writes to the stderr of its own test."""
    log = logging.getLogger("burnish")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = before[0], before[1]
    log.setLevel(before[2])


@pytest.fixture
def small_files() -> Iterator[int]:
    """A disk that is full after 100 kB of a file, as `ulimit -f` makes one; gives a number too many."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
