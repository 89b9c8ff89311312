"""Runs whose examples begin alike: shared or not, on one process or two, and resumed."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_loop import SendsSignal

from burnish.errors import InterruptedRunError
from burnish.runtime import Ranks
from burnish.train.loop import train
from rig.runs import make_job, run_case, summary
from rig.spawn import run_cases
from rig.toy import toy_config

ALONE = Ranks(0, 0, 1)
APART = {"data.share_prefix": "off"}
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}}


@pytest.mark.parametrize("settings", [{}, LORA])
def test_same_run_with_fewer_micro_batches(tmp_path: Path, settings: dict) -> None:
    shared = run_case(settings, ALONE, tmp_path / "shared", evaluate=True, alike=True)
    apart = run_case({**settings, **APART}, ALONE, tmp_path / "apart", evaluate=True, alike=True)
    assert sum(shared["micro_batches"]) < sum(apart["micro_batches"])
    assert shared["example_ids"] == apart["example_ids"]
    assert shared["losses"] == pytest.approx(apart["losses"], rel=1e-5)
    assert shared["norms"] == pytest.approx(apart["norms"], rel=1e-4)
    assert [e[1] for e in shared["evals"]] == pytest.approx([e[1] for e in apart["evals"]], rel=1e-5)


def test_two_processes(tmp_path: Path) -> None:
    alone = run_case({}, ALONE, tmp_path / "alone", alike=True)
    cases = {"two": {"kind": "plain", "settings": {}, "alike": True}}
    two = run_cases(cases, tmp_path / "two", 2)["two"]
    assert two["example_ids"] == alone["example_ids"]
    assert sum(two["micro_batches"]) < sum(alone["micro_batches"])
    assert two["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert two["norms"] == pytest.approx(alone["norms"], rel=1e-4)


def test_resumed_to_the_bit(tmp_path: Path) -> None:
    whole = run_case({}, ALONE, tmp_path / "whole", alike=True)
    resumable = {"checkpoint.resume": "auto"}
    job = make_job(toy_config(tmp_path / "cut", resumable), ALONE, alike=True)
    job = replace(job, recorder=SendsSignal())
    with pytest.raises(InterruptedRunError):
        train(job)
    second = run_case(resumable, ALONE, tmp_path / "cut", alike=True)
    assert summary(job)["losses"] + second["losses"] == whole["losses"]
    assert second["hash"] == whole["hash"]


def test_nothing_in_common_is_bit_identical(tmp_path: Path) -> None:
    shared = run_case({}, ALONE, tmp_path / "shared")
    apart = run_case(APART, ALONE, tmp_path / "apart")
    assert (shared["hash"], shared["losses"]) == (apart["hash"], apart["losses"])
