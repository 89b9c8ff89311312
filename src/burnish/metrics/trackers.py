"""Where numbers go besides `metrics.jsonl`. Each tracker imports its package when it is made."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from burnish.config.packages import require_package
from burnish.errors import BurnishError, MachineError, Problem

PROJECT = "burnish"


class Tracker(ABC):
    """Takes named numbers by step."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step."""

    @abstractmethod
    def close(self) -> None:
        """Flush and finish."""


@contextmanager
def in_words(name: str) -> Iterator[None]:
    """Whatever a tracker's package raises in the block is an error of the machine: login, network, server.

    Wide on purpose: the packages' errors share no class, and one that is not foreseen would end the run.

    Raises:
        MachineError: With the tracker's name, and what it said.
    """
    try:
        yield
    except BurnishError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        cure = f"Mend that (a login, the network, the server), or leave {name} out of log.trackers."
        raise MachineError(
            Problem("log.trackers", f"{name}: {type(error).__name__}: {said}", cure)
        ) from error


def make_tracker(
    name: str, run_dir: Path, run_config: Mapping[str, Any], resumed_step: int | None
) -> Tracker:
    """Start a tracker by its name in `log.trackers`.

    Raises:
        MachineError: Its package is not installed, or it cannot be started.
    """
    with in_words(name):
        if name == "tensorboard":
            return TensorBoard(run_dir / "tensorboard", resumed_step)
        require_package(name)
        module = importlib.import_module(name)
        makers = {"wandb": WandB, "trackio": Trackio, "mlflow": MLflow}
        return makers[name](module, run_dir, run_config)


@final
class TensorBoard(Tracker):
    """Event files, written with the tensorboard package alone (no torch, no TensorFlow)."""

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = Event
        self._summary: Any = Summary
        self._writer = EventFileWriter(str(folder))
        if resumed_step is not None:
            # A restart mark: TensorBoard drops what older files hold from this step on.
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=resumed_step + 1, session_log=start))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        pairs = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.add_event(
            self._event(step=step, wall_time=time.time(), summary=self._summary(value=pairs))
        )

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


@final
class WandB(Tracker):
    """Weights & Biases, one run named after the run's folder."""

    def __init__(self, module: Any, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        self._run = module.init(project=PROJECT, name=run_dir.name, dir=str(run_dir), config=dict(run_config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


@final
class Trackio(Tracker):
    """Trackio, one run named after the run's folder."""

    def __init__(self, module: Any, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project=PROJECT, name=run_dir.name, config=dict(run_config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._module.finish()


@final
class MLflow(Tracker):
    """MLflow, one run named after the run's folder, in the experiment `burnish`."""

    def __init__(self, module: Any, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        self._module = module
        module.set_experiment(PROJECT)
        module.start_run(run_name=run_dir.name)
        module.log_dict(dict(run_config), "config.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._module.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._module.end_run()
