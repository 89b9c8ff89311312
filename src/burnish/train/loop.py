"""The training loop. The step itself is `train_step`, in `train/step.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from burnish.checkpoint.commit import save_checkpoint
from burnish.checkpoint.fingerprints import changed_settings
from burnish.checkpoint.resume import (
    clear_the_way,
    find_checkpoint,
    is_own,
    load_checkpoint,
    package_versions,
)
from burnish.checkpoint.retention import prune
from burnish.config.schema import Config
from burnish.data.store import ExampleStore
from burnish.data.windows import WindowPlan
from burnish.engine.base import Engine
from burnish.engine.watched import WatchedEngine
from burnish.errors import InterruptedRunError, MachineError, Problem, TrainingStoppedError
from burnish.host_memory import FreedMemory
from burnish.plan import learning_rate
from burnish.records import EvalStats, StepStats, TrainState, Window
from burnish.runtime import Ranks, barrier, log, seed_everything
from burnish.train.evaluate import Cuts, evaluate
from burnish.train.rehearsal import rehearse
from burnish.train.signals import StopRequest
from burnish.train.step import Feed, train_step
from burnish.watchdog import Watchdog


@runtime_checkable
class Recorder(Protocol):
    """Where the loop tells what happened; rank 0's writes it down."""

    def train(self, stats: StepStats) -> None:
        """One optimizer step."""

    def eval(self, stats: EvalStats) -> None:
        """One evaluation."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Anything else worth a line."""


@dataclass(frozen=True)
class TrainJob:
    """Everything the loop needs, made by the stages before it."""

    config: Config
    engine: Engine
    ranks: Ranks
    windows: WindowPlan
    feed: Feed
    eval_store: ExampleStore | None
    eval_cuts: Cuts | None
    recorder: Recorder
    fingerprints: Mapping[str, str]
    """What a resumed run must share, by name: see `TrainState.fingerprints`."""
    freed: FreedMemory | None = None
    """What becomes of memory that tensors on a CPU leave."""
    export_best: Callable[[TrainState], None] | None = None
    """Called on every rank when an evaluation was the best so far."""
    export_final: Callable[[TrainState], None] | None = None
    """Called on every rank at the end."""
    on_start: Callable[[], None] | None = None
    """Called on every rank when it is certain that this run may go on from what its folder holds."""

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)


def train(job: TrainJob) -> TrainState:
    """Run the job to its last step, from the newest whole checkpoint if there is one.

    Evaluates before the first step, every `eval.every_steps`, and after the last. Saves every
    `checkpoint.every_steps`, and when a signal asks to stop.

    Returns:
        Where the run stands at the end.

    Raises:
        InterruptedRunError: SIGTERM or SIGINT arrived; a checkpoint was saved.
        TrainingStoppedError: `train.max_skipped_steps` steps in a row had gradients that were not
            finite; a checkpoint from before the first of them was saved.
        MachineError: A result could not be exported; a checkpoint of what was trained was saved.
        CheckpointError: The checkpoint to resume from is damaged, belongs to another run, or is past the end
            of this one.
    """
    timeout_seconds = job.config.launch.hang_timeout_seconds
    with StopRequest() as stop:
        with Watchdog(job.run_dir, job.ranks, timeout_seconds) as watchdog:
            watched = replace(job, engine=WatchedEngine(job.engine, watchdog, job.freed))
            state, keeper = _run(watched, stop)
        _finish(job, keeper, state)
    return state


def _run(job: TrainJob, stop: StopRequest) -> tuple[TrainState, _Keeper]:
    """From the newest checkpoint, or from the beginning, to the last step."""
    resumed_from = find_checkpoint(job.run_dir, job.config.checkpoint.resume, job.ranks)
    state = _start_state(job, resumed_from)
    clear_the_way(job.run_dir, resumed_from, job.ranks)
    if resumed_from is None and (job.run_dir / "final").exists() and job.ranks.is_main:
        log.warning("%s is of an earlier run; it is replaced when this one is done.", job.run_dir / "final")
    if job.on_start is not None:
        job.on_start()
    rehearse(job.engine, job.config, job.feed, job.eval_store is not None, job.ranks)
    keeper = _Keeper(job, state, resumed_from)
    if resumed_from is None or state.eval_due:
        state = _evaluate_and_track(job, keeper, replace(state, eval_due=False))
    while state.step < job.windows.num_steps:
        state, must_stop = _one_step(job, keeper, state, stop)
        if must_stop:
            _stop_for_signal(job, keeper, state)
    return state, keeper


def _finish(job: TrainJob, keeper: _Keeper, state: TrainState) -> None:
    """Export what is done. A signal is left for afterwards."""
    if job.export_final is not None:
        _export(job, job.export_final, state, keeper, state)


def _export(
    job: TrainJob, export: Callable[[TrainState], None], state: TrainState, keeper: _Keeper, stand: TrainState
) -> None:
    """Export, and do not lose what cannot be exported.

    Args:
        job: Which.
        export: Writes a result.
        state: What it is the result of.
        keeper: Saves where the run stands.
        stand: Where that is: what is still to be done from there on.

    Raises:
        MachineError: It could not be exported; a checkpoint was saved.
    """
    try:
        export(state)
    except MachineError as error:
        path = keeper.save(stand)
        saved = Problem(str(path), "holds what was trained", f"Mend that. {_how_to_go_on(job.config, path)}")
        raise MachineError(*error.problems, saved, everywhere=error.everywhere) from error


def _how_to_go_on(config: Config, path: Path) -> str:
    """What begins anew, or from a folder of its own, would do so again."""
    goes_on = config.checkpoint.resume in ("auto", "must")
    return f"Run the same command{'' if goes_on else ' with checkpoint.resume: auto'} to go on from {path}."


def _one_step(
    job: TrainJob, keeper: _Keeper, state: TrainState, stop: StopRequest
) -> tuple[TrainState, bool]:
    """The next window and all that hangs on its number: record, skip count, evaluation, save."""
    config, num_steps = job.config, job.windows.num_steps
    window = job.windows.window(state.step + 1)
    lr = learning_rate(window.step, num_steps, config.optim, config.schedule)
    stats, must_stop = train_step(
        job.engine, window, job.feed, job.ranks, lr, stop_asked=stop.received is not None
    )
    stats = replace(stats, epoch=job.windows.epochs_done(window.step))
    state = _advance(state, window, stats)
    last = state.step == num_steps
    if last or not stats.applied or state.step % config.log.every_steps == 0 or state.step == 1:
        job.recorder.train(stats)
    if not stats.applied:
        _record_skip(job, keeper, state, stats)
    if last or _is_due(state.step, config.eval.every_steps):
        # Who sent a signal waits half a minute or so: an evaluation would not fit before the checkpoint.
        is_put_off = must_stop and not last
        state = replace(state, eval_due=True) if is_put_off else _evaluate_and_track(job, keeper, state)
    if stats.applied:
        keeper.good_state = state
        # Never in a row of skipped steps: if it stops the run, the newest is from before the row.
        if _is_due(state.step, config.checkpoint.every_steps):
            keeper.save(state)
    return state, must_stop


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _start_state(job: TrainJob, resumed_from: Path | None) -> TrainState:
    """Step 0 with fresh random state, or everything as the checkpoint has it."""
    if resumed_from is not None:
        state = load_checkpoint(
            resumed_from,
            job.engine,
            job.ranks,
            job.fingerprints,
            allowed_changes=job.config.checkpoint.allow_changes,
            num_steps=job.windows.num_steps,
        )
        log.info("Resumed from %s at step %d of %d.", resumed_from, state.step, job.windows.num_steps)
        for line in changed_settings(resumed_from, job.config) if job.ranks.is_main else ():
            log.warning("%s", line)
        event = {"kind": "resume", "step": state.step, "path": str(resumed_from)}
        own = is_own(job.run_dir, resumed_from)
        job.recorder.event({**event, "eval_due": state.eval_due, "from_own": own})
        return state
    # Ranks see different examples, so their dropout must differ too.
    seed_everything(job.config.train.seed + job.ranks.rank)
    return TrainState(
        step=0,
        epoch=0,
        num_examples=0,
        num_tokens=0,
        num_supervised_tokens=0,
        best_eval_loss=None,
        best_eval_step=None,
        num_skipped_in_a_row=0,
        rng={},
        fingerprints=dict(job.fingerprints),
        versions=package_versions(),
        world_size=job.ranks.world_size,
    )


def _advance(state: TrainState, window: Window, stats: StepStats) -> TrainState:
    return replace(
        state,
        step=window.step,
        epoch=window.epoch,
        num_examples=state.num_examples + stats.num_examples,
        num_tokens=state.num_tokens + stats.num_tokens,
        num_supervised_tokens=state.num_supervised_tokens + stats.num_supervised_tokens,
        num_skipped_in_a_row=0 if stats.applied else state.num_skipped_in_a_row + 1,
    )


def _evaluate_and_track(job: TrainJob, keeper: _Keeper, state: TrainState) -> TrainState:
    """Evaluate if there is held-out data, and remember the best since training began.

    The untrained model at step 0 is measured but is never the best: exporting it helps nobody.

    Raises:
        MachineError: The best could not be exported; a checkpoint was saved.
    """
    if job.eval_store is None or job.eval_cuts is None:
        return state
    stats = evaluate(
        job.engine,
        job.eval_store,
        job.eval_cuts,
        job.ranks,
        step=state.step,
        packed=job.feed.packed,
        pad_token_id=job.feed.pad_token_id,
    )
    job.recorder.eval(stats)
    best = float("inf") if state.best_eval_loss is None else state.best_eval_loss
    if state.step == 0 or not stats.loss < best:
        return state
    improved = replace(state, best_eval_loss=stats.loss, best_eval_step=state.step)
    if job.export_best is not None:
        _export(job, job.export_best, improved, keeper, replace(state, eval_due=True))
    return improved


def _record_skip(job: TrainJob, keeper: _Keeper, state: TrainState, stats: StepStats) -> None:
    """Write down a step that no rank applied; stop when there were too many in a row.

    Raises:
        TrainingStoppedError: `train.max_skipped_steps` in a row.
    """
    event = {
        "kind": "skipped",
        "step": stats.step,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "num_skipped_in_a_row": state.num_skipped_in_a_row,
        "example_ids": list(stats.example_ids),
        "examples": [job.feed.store.origin(i) for i in stats.example_ids],
    }
    job.recorder.event(event)
    limit = job.config.train.max_skipped_steps
    log.warning("Step %d skipped: a gradient was not finite (loss %s).", stats.step, stats.loss)
    if state.num_skipped_in_a_row < limit:
        return
    # Skipped steps changed no weight, so this is the state from before the first of them.
    path = keeper.save(keeper.good_state)
    raise TrainingStoppedError(
        Problem(
            f"step {stats.step}",
            f"{limit} steps in a row had gradients that are not finite",
            f"The state from before them is in {path}; metrics.jsonl has their rows (kind: skipped). Look at "
            "them (view CONFIG --source S --row R), lower optim.lr, or use model.dtype: bf16, not fp16.",
        ),
        everywhere=True,
    )


def _stop_for_signal(job: TrainJob, keeper: _Keeper, state: TrainState) -> None:
    """Save and end, unless the step just done was the last anyway."""
    if state.step >= job.windows.num_steps:
        return
    path = keeper.save(state)
    problem = Problem("signal", f"stopped after step {state.step}", _how_to_go_on(job.config, path))
    raise InterruptedRunError(problem, everywhere=True)


class _Keeper:
    """Saves checkpoints and removes old ones, never the one that the run came from."""

    def __init__(self, job: TrainJob, state: TrainState, resumed_from: Path | None) -> None:
        self.good_state = state
        self._job = job
        self._protected = [] if resumed_from is None else [resumed_from]
        self._last: tuple[int, Path] | None = None if resumed_from is None else (state.step, resumed_from)

    def save(self, state: TrainState) -> Path:
        """Commit a checkpoint, then prune. A step that is already saved is not saved again."""
        if self._last is not None and self._last[0] == state.step:
            return self._last[1]
        job = self._job
        path = save_checkpoint(job.engine, state, job.run_dir, job.ranks)
        self._last = (state.step, path)
        if job.ranks.is_main:
            prune(job.run_dir, job.config.checkpoint.keep, self._protected)
        job.recorder.event({"kind": "checkpoint", "step": state.step, "path": str(path)})
        barrier(job.ranks)
        return path
