"""The folders that a run writes to and goes on from, looked at before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from burnish.config.schema import Config
from burnish.durable import try_writing
from burnish.errors import MachineError, Problem


def require_output_dir(config: Config) -> None:
    """Nothing, if `output_dir` can be written; found before hours of work, not after. It is left as it was.

    Raises:
        MachineError: It cannot be made, or not be written.
    """
    try:
        try_writing(Path(config.output_dir))
    except OSError as error:
        what = f"{config.output_dir} cannot be written: {error.strerror or error}"
        cure = "Choose another output_dir, or mend its permissions or the disk."
        raise MachineError(Problem("output_dir", what, cure)) from error


def check_resumed(config: Config) -> Iterator[Problem]:
    """Whether `checkpoint.resume` names what a run can go on from."""
    resume = config.checkpoint.resume
    if resume in ("auto", "never", "must"):  # a folder may be called so too
        return
    if not (resume.strip() and Path(resume).is_dir()):
        cure = "Give auto, never, must, or the folder of a checkpoint."
        yield Problem("checkpoint.resume", f"there is no folder {resume!r}", cure)
    elif not (Path(resume) / "MANIFEST.json").exists():
        yield from _check_resumed_run(Path(resume))


def _check_resumed_run(folder: Path) -> Iterator[Problem]:
    """A run's folder, or that of its checkpoints, where one checkpoint is meant."""
    for place in (folder / "checkpoints", folder):
        found = max(place.glob("step-*/MANIFEST.json"), key=lambda path: path.parent.name, default=None)
        if found is not None:
            cure = f"Name one of those in it: checkpoint.resume: {found.parent}."
            yield Problem("checkpoint.resume", f"{folder} holds checkpoints and is none itself", cure)
            return
    if (folder / "checkpoints").is_dir():
        cure = "Give the folder of a checkpoint, RUN/checkpoints/step-…; `burnish ckpt ls RUN` lists them."
        yield Problem("checkpoint.resume", f"{folder} is a run, and has no checkpoint to go on from", cure)


def check_output(config: Config) -> Iterator[Problem]:
    """Whether `output_dir` may be a run's folder."""
    text = config.output_dir
    if not text.strip() or "\0" in text:
        yield Problem("output_dir", f"{text!r} is not a path", "Give a folder, for example runs/first.")
        return
    folder = Path(text).resolve()
    if os.path.exists(folder) and not os.path.isdir(folder):  # noqa: PTH110, PTH112 - Path's may raise
        yield Problem("output_dir", f"{text} is a file", "Give a folder.")
    if folder in (Path(folder.anchor), Path.home().resolve(), Path.cwd().resolve()):
        cure = "Give the run a folder of its own, for example runs/first."
        yield Problem("output_dir", f"{folder} is not a folder for a run", cure)
    model = Path(config.model.path)
    if model.is_dir() and (
        folder == model.resolve() or model.resolve() in (folder / "final", folder / "best")
    ):
        cure = "The run would write over the model it starts from: give another folder."
        yield Problem("output_dir", f"{text} holds model.path ({config.model.path})", cure)
