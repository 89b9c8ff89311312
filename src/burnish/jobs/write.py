"""From a config and what the user said about machines to a job file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from burnish.config.load import dump_config, load_config
from burnish.errors import ConfigError, Problem, writing
from burnish.jobs.kubernetes import train_job
from burnish.jobs.options import Job, JobKind, JobOptions, job_name
from burnish.jobs.skypilot import sky_task
from burnish.jobs.slurm import slurm_script

_WRITERS: Mapping[JobKind, Callable[[Job, str], str]] = {
    "slurm": slurm_script,
    "k8s": train_job,
    "skypilot": sky_task,
}
_SUFFIXES: Mapping[JobKind, str] = {"slurm": ".sbatch", "k8s": ".trainjob.yaml", "skypilot": ".sky.yaml"}
_SUBMIT: Mapping[JobKind, str] = {
    "slurm": "sbatch",
    "k8s": "kubectl apply -f",
    "skypilot": "sky jobs launch",
}


def write_job(
    kind: JobKind, tokens: Sequence[str], options: JobOptions, out: Path | None = None
) -> list[str]:
    """Write a job file.

    Args:
        kind: The scheduler.
        tokens: A command line's CONFIG and flags, as `train` takes them; here the file must be given.
        options: Machines, time and names.
        out: Where the file goes; None is a name of the job's in the working folder.

    Returns:
        Lines for the user: what was written, and what to type next.

    Raises:
        ConfigError: The config or the options cannot be right, or the file is there already.
        MachineError: The file cannot be written.
    """
    if not tokens or tokens[0].startswith("-"):
        cure = "burnish launch slurm sft.yaml; burnish init DATA writes a config."
        raise ConfigError(Problem("CONFIG", "a job needs a config file", cure))
    path, text = job_file(kind, Path(tokens[0]), tokens[1:], options, out)
    with writing(path):
        is_another = path.exists() and path.read_bytes() != text.encode()
        if not is_another:
            path.write_bytes(text.encode())
    if is_another:
        raise ConfigError(Problem("--out", f"{path} is there already", "Give another --out, or remove it."))
    return [f"Wrote {path}. Look it over, then: {_SUBMIT[kind]} {path}"]


def job_file(
    kind: JobKind,
    config_path: Path,
    overrides: Sequence[str] = (),
    options: JobOptions | None = None,
    out: Path | None = None,
) -> tuple[Path, str]:
    """A job file's path and text; nothing is written and nothing is submitted.

    Args:
        kind: The scheduler.
        config_path: A config that `train` takes; it is read and checked here.
        overrides: Flags that would stand behind it.
        options: Machines, time and names.
        out: Where the file is to go; None is a name of the job's in the working folder.

    Raises:
        ConfigError: The config or the options cannot be right; all problems at once.
    """
    config = load_config(config_path, overrides)
    chosen = options or JobOptions()
    name = chosen.name or job_name(Path(config.output_dir).name)
    job = Job(name, chosen, config_path, tuple(overrides), dump_config(config), config.output_dir)
    job.check(kind)
    path = out or Path(name + _SUFFIXES[kind])
    return path, _WRITERS[kind](job, str(path))
