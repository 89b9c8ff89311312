"""The loop in one process: when it evaluates, saves, and stops."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.checkpoint.manifest import checkpoint_path, committed_paths
from burnish.config.load import dump_config
from burnish.errors import (
    CheckpointError,
    InterruptedRunError,
    MachineError,
    Problem,
    TrainingStoppedError,
)
from burnish.records import StepStats, TrainState
from burnish.runtime import Ranks
from burnish.train.loop import train
from burnish.train.signals import StopRequest
from rig.cases import PoisonedEngine
from rig.runs import Memory, make_job, run_case, summary
from rig.toy import toy_config

ALONE = Ranks(0, 0, 1)
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}


class SendsSignal(Memory):
    at_step = 3

    def train(self, stats: StepStats) -> None:
        super().train(stats)
        if stats.step == self.at_step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_evaluates_before_between_and_after(tmp_path: Path) -> None:
    result = run_case({"eval.every_steps": 4}, ALONE, tmp_path, evaluate=True)
    assert [e[0] for e in result["evals"]] == [0, 4, 6]


def test_evaluation_is_by_token_over_every_example(tmp_path: Path) -> None:
    job = make_job(toy_config(tmp_path, {"train.max_steps": 1}), ALONE, evaluate=True)
    store, cuts = job.eval_store, job.eval_cuts
    assert store is not None
    assert cuts is not None
    assert sorted(int(i) for cut in cuts[0] for i in cut) == list(range(len(store.num_tokens)))
    train(job)
    memory = job.recorder
    assert isinstance(memory, Memory)
    last = memory.evals[-1]
    weights = np.bincount(store.source_ids, weights=store.total_weight)
    losses = [last.sources[name]["loss"] for name in store.source_names]
    assert last.loss == pytest.approx(float(np.average(losses, weights=weights)), rel=1e-9)
    assert last.perplexity == pytest.approx(math.exp(last.loss))
    assert last.num_supervised_tokens == store.num_supervised.sum()


def test_best_is_exported_when_it_is_better(tmp_path: Path) -> None:
    exported: list[int] = []
    job = make_job(toy_config(tmp_path, {"eval.every_steps": 1}), ALONE, evaluate=True)
    memory = job.recorder
    assert isinstance(memory, Memory)
    job = replace(job, export_best=lambda state: exported.append(state.step))
    state = train(job)
    best = math.inf
    expected = []
    for stats in memory.evals[1:]:  # the untrained model is never the best
        if stats.loss < best:
            best = stats.loss
            expected.append(stats.step)
    assert exported == expected
    assert (state.best_eval_step, state.best_eval_loss) == (expected[-1], best)


def test_checkpoints_every_so_many_steps(tmp_path: Path) -> None:
    run_case({"checkpoint.every_steps": 1, "checkpoint.keep": 2}, ALONE, tmp_path)
    assert [p.name for p in committed_paths(tmp_path)] == ["step-00000006", "step-00000005"]


def test_no_checkpoint_unless_asked(tmp_path: Path) -> None:
    run_case({}, ALONE, tmp_path)
    assert committed_paths(tmp_path) == []


@pytest.mark.parametrize("settings", [{}, {"adapter": LORA}, {"adapter": LORA, "model.dtype": "bf16"}])
def test_signal_then_resume_to_the_bit(tmp_path: Path, settings: Mapping[str, Any]) -> None:
    """Dropout included: random state comes back too."""
    whole = run_case(settings, ALONE, tmp_path / "whole")
    resumable = {**settings, "checkpoint.resume": "auto"}
    job = replace(make_job(toy_config(tmp_path / "cut", resumable), ALONE), recorder=SendsSignal())
    with pytest.raises(InterruptedRunError, match="after step 4") as caught:
        train(job)
    assert caught.value.exit_code == 143
    first = summary(job)
    second = run_case(resumable, ALONE, tmp_path / "cut")
    assert first["losses"] + second["losses"] == whole["losses"]
    assert first["norms"] + second["norms"] == whole["norms"]
    assert second["hash"] == whole["hash"]


def test_an_evaluation_put_off_for_a_signal_is_made_up_for(tmp_path: Path) -> None:
    """The signal comes in step 4 of 6, whose evaluation may be the best one."""
    settings = {"eval.every_steps": 4, "checkpoint.resume": "auto"}
    whole = run_case(settings, ALONE, tmp_path / "whole", evaluate=True)
    cut = tmp_path / "cut"
    job = replace(make_job(toy_config(cut, settings), ALONE, evaluate=True), recorder=SendsSignal())
    with pytest.raises(InterruptedRunError, match="after step 4"):
        train(job)
    first = summary(job)
    assert [e[0] for e in first["evals"]] == [0]
    exported: list[int] = []
    job = make_job(toy_config(cut, settings), ALONE, evaluate=True)
    state = train(replace(job, export_best=lambda state: exported.append(state.step)))
    assert first["evals"] + summary(job)["evals"] == whole["evals"]
    assert exported[0] == 4
    assert not state.eval_due


def test_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    settings = {"checkpoint.every_steps": 3, "checkpoint.resume": "auto"}
    done = run_case(settings, ALONE, tmp_path)
    again = run_case(settings, ALONE, tmp_path)
    assert again["losses"] == []
    assert again["hash"] == done["hash"]


def test_resume_from_an_older_path(tmp_path: Path) -> None:
    settings = {"checkpoint.every_steps": 2, "checkpoint.keep": 9}
    done = run_case(settings, ALONE, tmp_path)
    older = checkpoint_path(tmp_path, 2)
    again = run_case({**settings, "checkpoint.resume": str(older)}, ALONE, tmp_path)
    assert again["losses"] == done["losses"][2:]
    assert again["hash"] == done["hash"]


def test_log_every_steps_keeps_first_and_last(tmp_path: Path) -> None:
    result = run_case({"log.every_steps": 4}, ALONE, tmp_path)
    assert len(result["losses"]) == 3  # steps 1, 4, 6


def test_no_checkpoint_of_a_skipped_step(tmp_path: Path) -> None:
    """Stopped in a row of skipped steps, the newest checkpoint is from before the row."""
    job = make_job(toy_config(tmp_path, {"checkpoint.every_steps": 1}), ALONE)
    job = replace(job, engine=PoisonedEngine(job.engine, dict.fromkeys((3, 4, 5), math.nan)))
    with pytest.raises(TrainingStoppedError, match="step-00000002") as caught:
        train(job)
    assert caught.value.exit_code == 5
    assert committed_paths(tmp_path)[0] == checkpoint_path(tmp_path, 2)
    skipped = [event for event in summary(job)["events"] if event["kind"] == "skipped"]
    assert [event["step"] for event in skipped] == [3, 4, 5]
    for event in skipped:  # as `burnish view --source --row` takes them
        examples = [job.feed.store[i] for i in event["example_ids"]]
        assert event["examples"] == [{"source": e.source, "row": e.row} for e in examples] != []
    assert "--row" in str(caught.value) and "metrics.jsonl" in str(caught.value)


def test_second_signal_acts_as_without_us() -> None:
    # A program started in the background may have inherited SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_best_that_cannot_be_exported_is_not_lost_either(tmp_path: Path) -> None:
    def full_disk(state: TrainState) -> None:
        raise MachineError(Problem("best", "cannot be written: no space left"))

    exported: list[int] = []
    settings = {"checkpoint.resume": "auto", "eval.every_steps": 2}
    config = toy_config(tmp_path, settings)
    with pytest.raises(MachineError, match=r"no space left(.|\n)*step-00000002"):
        train(replace(make_job(config, ALONE, evaluate=True), export_best=full_disk))
    again = make_job(config, ALONE, evaluate=True)
    again = replace(again, export_best=lambda state: exported.append(state.step))
    train(again)
    assert summary(again)["losses"] == run_case({}, ALONE, tmp_path / "whole")["losses"][2:]
    assert exported and exported[0] == 2  # the evaluation that found it is made up for


@pytest.mark.parametrize("resume", ["never", "auto", "folder"])
def test_who_stops_is_told_how_to_go_on(tmp_path: Path, resume: str) -> None:
    if resume == "folder":
        run_case({"checkpoint.every_steps": 2, "train.max_steps": 2}, ALONE, tmp_path / "other")
    given = str(checkpoint_path(tmp_path / "other", 2)) if resume == "folder" else resume
    config = toy_config(tmp_path / "run", {"checkpoint.resume": given})
    with pytest.raises(InterruptedRunError) as caught:
        train(replace(make_job(config, ALONE), recorder=SendsSignal()))
    said = "with checkpoint.resume: auto" in str(caught.value)
    assert said == (resume != "auto")  # the same command would begin anew


def test_what_cannot_be_exported_is_not_lost(tmp_path: Path) -> None:
    exported: list[int] = []

    def full_disk(state: TrainState) -> None:
        raise MachineError(Problem("final", "cannot be written: no space left"))

    config = toy_config(tmp_path, {"checkpoint.resume": "auto"})
    with pytest.raises(MachineError, match=r"no space left(.|\n)*step-00000006.*holds what was trained"):
        train(replace(make_job(config, ALONE), export_final=full_disk))
    again = replace(make_job(config, ALONE), export_final=lambda state: exported.append(state.step))
    train(again)
    assert exported == [6]
    assert summary(again)["losses"] == []


def test_a_refused_run_does_not_start(tmp_path: Path) -> None:
    """What it would write over describes the run that is there."""
    started: list[bool] = []
    saved = {"checkpoint.resume": "auto", "checkpoint.every_steps": 3}
    train(replace(make_job(toy_config(tmp_path, saved), ALONE), on_start=lambda: started.append(True)))
    other = replace(
        make_job(toy_config(tmp_path, saved), ALONE),
        fingerprints={"data": "another", "order": "seed 3"},
        on_start=lambda: started.append(True),
    )
    with pytest.raises(CheckpointError):
        train(other)
    assert started == [True]


def test_a_shorter_run_changes_nothing_of_the_longer_one(tmp_path: Path) -> None:
    """What would be exported is an older model than the one that is there."""
    saved = {"checkpoint.every_steps": 2, "checkpoint.keep": 9}
    train(make_job(toy_config(tmp_path, saved), ALONE))
    before = committed_paths(tmp_path)
    told: list[str] = []
    for resume in ("auto", str(checkpoint_path(tmp_path, 4))):
        shorter = make_job(toy_config(tmp_path, {"train.max_steps": 3, "checkpoint.resume": resume}), ALONE)
        shorter = replace(
            shorter,
            on_start=lambda: told.append("start"),
            export_final=lambda state: told.append("final"),
        )
        with pytest.raises(CheckpointError, match="ends at 3"):
            train(shorter)
        assert summary(shorter)["events"] == []  # the metrics are cut when a resume is told
    assert (told, committed_paths(tmp_path)) == ([], before)


def test_a_new_run_leaves_an_earlier_ones_best(tmp_path: Path) -> None:
    """Its first best is the best of its own evaluations only."""
    best = tmp_path / "best"

    def export_best(state: TrainState) -> None:
        best.mkdir(exist_ok=True)
        (best / "step").write_text(str(state.step))

    saved = {"checkpoint.every_steps": 3}
    for resume, num_steps in (("auto", 4), ("auto", 6), ("never", 2)):
        settings = {**saved, "checkpoint.resume": resume, "train.max_steps": num_steps}
        job = make_job(toy_config(tmp_path, settings), ALONE, evaluate=True)
        train(replace(job, export_best=export_best))
    assert (best / "step").read_text() == "2"
    assert (tmp_path / "best-1" / "step").read_text() == "6"  # its own, after it was resumed
    assert not (tmp_path / "best-2").exists()


def test_who_goes_on_with_another_rate_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = {"checkpoint.every_steps": 2, "checkpoint.resume": "auto"}
    config = toy_config(tmp_path, {**saved, "train.max_steps": 2})
    train(make_job(config, ALONE))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    train(make_job(toy_config(tmp_path, {**saved, "optim.lr": 5e-5}), ALONE))
    told = [message for message in caplog.messages if " before, " in message]
    assert told == ["optim.lr: 0.01 before, 5e-05 now", "train.max_steps: 2 before, 6 now"]


def test_who_starts_over_is_told_what_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = toy_config(tmp_path, {"train.max_steps": 1})
    train(make_job(config, ALONE))
    assert "earlier run" not in caplog.text
    (tmp_path / "final").mkdir()
    train(make_job(config, ALONE))
    assert "final is of an earlier run" in caplog.text
