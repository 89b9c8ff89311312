"""metrics.jsonl as the contract has it: whole numbers, strict JSON, no step twice."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from burnish.errors import MachineError
from burnish.metrics import MetricsWriter
from burnish.metrics.console import ConsoleProgress
from burnish.metrics.lines import read_lines
from burnish.records import EvalStats, StepStats
from burnish.runtime import Ranks

ONE = Ranks(0, 0, 1)
STEP = StepStats(
    step=1,
    epoch=0.1,
    loss=1 / 3,
    lr=1e-4,
    grad_norm=0.1 + 0.2,
    applied=True,
    num_examples=4,
    num_tokens=100,
    num_supervised_tokens=40,
    seconds=0.5,
    peak_memory_bytes=None,
    example_ids=(1, 2, 3, 4),
    num_micro_batches=1,
)
EVAL = EvalStats(0, 2.5, 12.18, 10, {"a": {"loss": 2.5}}, 0.1)


def writer(folder: Path, trackers=(), ranks=ONE) -> MetricsWriter:
    return MetricsWriter(folder, trackers, ranks, num_steps=9)


def lines(folder: Path) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in text]


def test_a_full_disk_is_named(tmp_path):
    out = writer(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(MachineError, match=r"metrics\.jsonl: cannot be written: No space left"):
        out.train(STEP)
    with pytest.raises(MachineError, match="No space left"):
        out.close()


def test_a_removed_file_is_begun_again(tmp_path):
    folder = tmp_path / "run"
    out = writer(folder)
    out.train(STEP)
    (folder / "metrics.jsonl").unlink()
    folder.rmdir()
    out.train(replace(STEP, step=2))
    out.close()
    assert [line["step"] for line in lines(folder)] == [2]


def test_an_evaluation_that_is_due_again_stands_once(tmp_path):
    out = writer(tmp_path)
    out.train(STEP)
    out.eval(replace(EVAL, step=1))
    out.close()
    out = writer(tmp_path)
    out.event({"kind": "resume", "step": 1, "eval_due": True})
    out.close()
    assert [line["kind"] for line in lines(tmp_path)] == ["train", "resume"]


def test_lines_are_exact(tmp_path):
    out = writer(tmp_path)
    out.eval(EVAL)
    out.train(STEP)
    out.train(replace(STEP, step=2, loss=float("nan"), grad_norm=float("inf"), applied=False))
    out.event({"kind": "skip", "step": 2, "example_ids": [1, 2]})
    out.close()
    first, train, bad, skip = lines(tmp_path)
    assert first == {
        "kind": "eval",
        "step": 0,
        "loss": 2.5,
        "perplexity": 12.18,
        "num_supervised_tokens": 10,
        "sources": {"a": {"loss": 2.5}},
        "seconds": 0.1,
    }
    assert train["loss"] == 1 / 3 and train["grad_norm"] == 0.1 + 0.2
    assert train["tokens_per_second"] == 200.0 and train["peak_memory_bytes"] is None
    assert (bad["loss"], bad["grad_norm"], bad["applied"]) == ("NaN", "Infinity", False)
    assert skip["example_ids"] == [1, 2]
    again = list(read_lines(tmp_path / "metrics.jsonl"))[2]
    assert again["loss"] != again["loss"] and again["grad_norm"] == float("inf")


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    out = writer(tmp_path)
    for step in range(1, 6):
        out.train(replace(STEP, step=step))
    out.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a crash cut this one off
    out = writer(tmp_path)
    out.event({"kind": "reject", "path": "step-5"})
    out.event({"kind": "resume", "step": 3})
    for step in range(4, 8):
        out.train(replace(STEP, step=step))
    out.close()
    assert [x["step"] for x in lines(tmp_path) if x["kind"] == "train"] == list(range(1, 8))
    assert [x["kind"] for x in lines(tmp_path)][3:5] == ["reject", "resume"]


def test_a_run_anew_sets_the_old_file_aside(tmp_path):
    for _ in range(2):
        out = writer(tmp_path)
        out.train(STEP)
        out.close()
    assert len(lines(tmp_path)) == 1
    assert (tmp_path / "metrics-1.jsonl").exists()


def test_a_run_that_goes_on_from_anothers_checkpoint_sets_the_old_file_aside(tmp_path):
    """What stands there is of another course, up to that step too."""
    for event in ({}, {"kind": "resume", "step": 2, "from_own": False}):
        out = writer(tmp_path)
        if event:
            out.event(event)
        for step in (1, 2, 3):
            out.train(replace(STEP, step=step))
        out.close()
    assert [x["kind"] for x in lines(tmp_path)] == ["resume", "train", "train", "train"]
    assert (tmp_path / "metrics-1.jsonl").exists()


def test_other_ranks_write_nothing(tmp_path):
    out = writer(tmp_path, ["tensorboard"], Ranks(1, 1, 2))
    out.train(STEP)
    out.eval(EVAL)
    out.event({"kind": "resume", "step": 1})
    out.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_holds_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = writer(tmp_path, ["tensorboard"])
    out.eval(EVAL)
    out.train(STEP)
    out.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert seen.Scalars("train/loss")[0].value == pytest.approx(1 / 3)
    assert seen.Scalars("eval/a/loss")[0].step == 0


def test_a_missing_tracker_is_a_clear_error(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MachineError, match=r"burnish\[wandb\]"):
        writer(tmp_path, ["wandb"]).train(STEP)


class Service:
    """A tracker's package whose server goes away after some calls."""

    def __init__(self, num_calls: int) -> None:
        self.num_calls, self.num_tries, self.seen = num_calls, 0, []

    def init(self, **_) -> "Service":
        return self

    def log(self, values: dict, step: int) -> None:
        self.num_tries += 1
        if self.num_tries > self.num_calls:
            raise RuntimeError("server went away\nand more")
        self.seen.append((step, values["train/loss"]))

    def finish(self) -> None:
        raise ConnectionError("server went away")


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    import sys

    service = Service(num_calls=1)
    monkeypatch.setitem(sys.modules, "trackio", service)
    monkeypatch.setattr("burnish.metrics.trackers.require_package", lambda _: None)
    out = writer(tmp_path, ["trackio"])
    for number in (1, 2, 3):
        out.train(replace(STEP, step=number))
    out.close()
    assert service.seen == [(1, STEP.loss)] and [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert service.num_tries == 2
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(set(told)) == 1 and "RuntimeError: server went away\n" in told[0]
    last = writer(tmp_path / "last", ["trackio"])
    last.event({"kind": "early"})
    last.close()
    assert "ConnectionError: server went away" in caplog.records[-1].getMessage()


def test_a_tracker_that_cannot_be_started_is_told_before_training(tmp_path, monkeypatch):
    import sys

    def init(**_):
        raise PermissionError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr("burnish.metrics.trackers.require_package", lambda _: None)
    with pytest.raises(MachineError, match="wandb: PermissionError: no API key"):
        writer(tmp_path, ["wandb"]).train(STEP)


def test_the_bar_and_the_lines_show_a_step(capfd):
    from burnish.runtime import setup_logging

    setup_logging(ONE)
    for live in (True, False):
        shown = ConsoleProgress(9, live)
        shown.train(STEP)
        shown.eval(EVAL)
        shown.close()
    text = capfd.readouterr().err
    assert "step 1/9" in text and "loss 0.3333" in text and "200 tokens/s" in text and "left" in text
