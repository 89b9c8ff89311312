"""What a job file needs to know beyond the config: machines, time, and who pays."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from burnish.errors import ConfigError, Problem

JobKind = Literal["slurm", "k8s", "skypilot"]

_TIME = re.compile(r"\d+|(\d+-)?\d{1,3}(:\d{2}){1,2}|\d+-\d{1,2}")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class JobOptions:
    """One job. What a scheduler has no use for is left out of its file."""

    name: str | None = None
    """Name of the job; the output folder's unless given."""
    num_nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs and processes on each; 0 for machines without: one process then."""
    cpus_per_node: int | None = None
    """CPU cores to ask for on each; what the scheduler gives unless given."""
    memory: str | None = None
    """Memory per node, in the scheduler's own notation: 500G, 500Gi, 500+."""
    time: str = "24:00:00"
    """Slurm: time limit, as D-HH:MM:SS, HH:MM:SS or minutes."""
    partition: str | None = None
    """Slurm: which partition."""
    account: str | None = None
    """Slurm: who pays."""
    stop_seconds: int = 600
    """How long before its end a job is asked to save: more than a step and a checkpoint take."""
    image: str | None = None
    """Container image; Kubernetes must have one, with burnish in it."""
    volume: str | None = None
    """Kubernetes: CLAIM:/PATH, the volume claim that holds data, model and output."""
    gpu: str | None = None
    """SkyPilot: the accelerator's name, for example H100."""
    python: str = sys.executable
    """Slurm: the interpreter on the nodes; a shared file system makes this one right."""


@dataclass(frozen=True)
class Job:
    """Everything a job file is written from, checked."""

    name: str
    options: JobOptions
    config_path: Path
    """As given: relative to where the job is submitted."""
    overrides: tuple[str, ...]
    """Flags that stood behind the config, handed on to `train`."""
    config_text: str
    """The config with the flags in it, for machines that cannot see the file."""
    output_dir: str

    @property
    def tasks_per_node(self) -> int:
        """Processes per node: one per GPU."""
        return max(1, self.options.gpus_per_node)

    def check(self, kind: JobKind) -> None:
        """Raise a ConfigError with everything that cannot be right."""
        problems = [*self._check_numbers(), *self._check_words(kind)]
        if problems:
            raise ConfigError(*problems)

    def _check_numbers(self) -> Iterator[Problem]:
        options = self.options
        least = {"num_nodes": 1, "gpus_per_node": 0, "stop_seconds": 1}
        for field, minimum in least.items():
            value = getattr(options, field)
            if value < minimum:
                yield Problem(_flag(field), f"is {value}", f"Give at least {minimum}.")
        if options.cpus_per_node is not None and options.cpus_per_node < self.tasks_per_node:
            what = f"is {options.cpus_per_node}, fewer than the {self.tasks_per_node} processes of a node"
            yield Problem("--cpus-per-node", what, "Give at least one for each.")

    def _check_words(self, kind: JobKind) -> Iterator[Problem]:
        options = self.options
        if not _NAME.fullmatch(self.name):
            cure = "Use small letters, digits and hyphens, a letter first: at most 63."
            yield Problem("--name", f"{self.name!r} is not a job's name", cure)
        if kind == "slurm" and not _TIME.fullmatch(options.time):
            yield Problem("--time", f"{options.time!r} is not a time limit", "Write 24:00:00 or 2-00:00:00.")
        if kind == "k8s" and not options.image:
            yield Problem("--image", "is missing", "Give a container image with burnish in it.")
        if options.volume is not None and not re.fullmatch(r"[a-z0-9.-]+:/\S+", options.volume):
            cure = "Write CLAIM:/PATH, for example training-data:/data."
            yield Problem("--volume", f"{options.volume!r} is not a claim and a path", cure)
        if kind == "skypilot" and options.gpus_per_node > 0 and not options.gpu:
            yield Problem("--gpu", "is missing", "Name the accelerator, for example H100.")
        if kind == "skypilot" and self.config_path.is_absolute():
            cure = "Give a path below this folder: SkyPilot takes this folder along."
            yield Problem("CONFIG", f"{self.config_path} is an absolute path", cure)


def job_name(text: str) -> str:
    """A name that every scheduler takes, as near to the text as it goes."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    named = plain if plain[:1].isalpha() else f"run-{plain}"
    return named[:63].strip("-")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
