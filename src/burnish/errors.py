"""Errors that are the user's to mend: one clear message, a documented exit code, no traceback.

Everything in Burnish may import this module; it imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_ENVIRONMENT = 4
EXIT_STOPPED_ITSELF = 5
EXIT_TRY_AGAIN = 75
EXIT_SIGNAL = 143


class BurnishError(Exception):
    """Base of every error that ends the program with a message instead of a traceback."""

    exit_code: int = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what was found there, and what to do about it."""

    where: str
    """A config key (`optim.lr`) or a place in a file (`train.jsonl:12`)."""
    what: str
    """What is wrong, the offending value included."""
    cure: str = ""
    """What to do about it; empty only where `what` already says it."""

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n    {self.cure}" if self.cure else head


class ProblemsError(BurnishError):
    """An error made of one or more problems, all reported at once.

    Args:
        problems: What is wrong; a plain string is a problem without a place.
    """

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem("", p) for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class ConfigError(ProblemsError):
    """The config cannot be what the user means: an unknown key, a wrong type, a contradiction."""

    exit_code = EXIT_CONFIG


class DataError(ProblemsError):
    """The data, the template or the tokenizer cannot be trained on as they are."""

    exit_code = EXIT_DATA


class MachineError(ProblemsError):
    """The machine lacks something: a device, a package, disk space, a working collective."""

    exit_code = EXIT_ENVIRONMENT


class CheckpointError(ProblemsError):
    """A checkpoint is missing, damaged, or belongs to another run."""

    exit_code = EXIT_ENVIRONMENT


class TrainingStoppedError(ProblemsError):
    """Training stopped itself, for example because losses were not finite too often."""

    exit_code = EXIT_STOPPED_ITSELF


class InterruptedRunError(ProblemsError):
    """A signal asked the run to stop; it saved a checkpoint and stopped."""

    exit_code = EXIT_SIGNAL
