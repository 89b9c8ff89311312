"""fp16: the same training as in fp32, and no example lost where gradients leave its range."""

from __future__ import annotations

import logging
import math
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from burnish.engine.base import StepResult
from burnish.engine.local import LocalEngine
from burnish.engine.precision import GROWTH_STEPS, LossScale
from burnish.errors import TrainingStoppedError
from burnish.runtime import Ranks
from burnish.train.loop import train
from rig.half import restless_scale
from rig.runs import Memory, make_job, run_case
from rig.spawn import run_cases
from rig.toy import toy_config

ALONE = Ranks(0, 0, 1)
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
LOSSES, NORMS = 2e-3, 1e-2
"""How far from fp32's: fp16 has 11 bits, and six large steps add up."""
TOO_LARGE = 40
"""As a power of two: no gradient of the toy fits fp16 at this loss scale."""
STAGES = {f"zero{stage}": {"engine.kind": "deepspeed", "engine.zero_stage": stage} for stage in (1, 2, 3, 0)}
"""Stage 0 last: DeepSpeed's autocast is a global of the process that ends with it."""


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fp32")
    return {
        name: run_case({"engine.kind": "local", **settings}, ALONE, folder / name)
        for name, settings in {"full": {}, "lora": LORA}.items()
    }


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for name, stage in {**STAGES, "local": {"engine.kind": "local"}}.items():
        saved = {"settings": {**stage, "checkpoint.resume": "auto"}, "power": TOO_LARGE}
        cases |= {
            f"{name}-full": {"settings": stage},
            f"{name}-lora": {"settings": {**stage, **LORA}},
            f"{name}-overflow": {"settings": stage, "power": TOO_LARGE},
            f"{name}-stopped": {**saved, "at_step": 3, "signal": int(signal.SIGTERM)},
            f"{name}-went-on": {**saved, "folder": f"{name}-stopped"},
        }
    for stage in (1, 2, 3):
        offload = {**STAGES[f"zero{stage}"], "engine.offload_optimizer": "cpu"}
        # First: stage 0 leaves a global of DeepSpeed's behind.
        cases = {f"zero{stage}-offloaded-overflow": {"settings": offload, "power": TOO_LARGE}, **cases}
    marked = {name: {"kind": "half", **case} for name, case in cases.items()}
    return run_cases(marked, tmp_path_factory.mktemp("fp16"), 2)


def same(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert all(ours["applied"]) and not ours["events"]
    assert ours["losses"] == pytest.approx(expected["losses"], rel=LOSSES)
    assert ours["norms"] == pytest.approx(expected["norms"], rel=NORMS)


@pytest.mark.parametrize("name", [*STAGES, "local"])
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_two_ranks_train_as_in_fp32(
    name: str, trained: str, on_two: dict[str, Any], exact: dict[str, Any]
) -> None:
    same(on_two[f"{name}-{trained}"], exact[trained])


OFFLOADED = [f"zero{stage}-offloaded" for stage in (1, 2, 3)]


@pytest.mark.parametrize("name", [*STAGES, "local", *OFFLOADED])
def test_overflow_costs_no_example(name: str, on_two: dict[str, Any], exact: dict[str, Any]) -> None:
    """Every step overflows until the scale fits; each is computed again, none is left out."""
    same(on_two[f"{name}-overflow"], exact["full"])
    assert on_two[f"{name}-overflow"]["example_ids"] == exact["full"]["example_ids"]


@pytest.mark.parametrize("name", [*STAGES, "local"])
def test_the_scale_is_part_of_a_checkpoint(name: str, on_two: dict[str, Any]) -> None:
    stopped, rest, whole = (on_two[f"{name}-{part}"] for part in ("stopped", "went-on", "overflow"))
    assert stopped["error"] == "InterruptedRunError"
    assert stopped["losses"] + rest["losses"] == whole["losses"]
    assert rest["hash"] == whole["hash"]


def test_a_step_is_repeated_until_it_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with restless_scale(TOO_LARGE), caplog.at_level(logging.INFO, logger="burnish"):
        job = make_job(toy_config(tmp_path, {"model.dtype": "fp16"}), ALONE)
        train(job)
    repeats = [record for record in caplog.records if "gradients overflow fp16" in record.message]
    assert isinstance(job.engine, LocalEngine)
    # Six steps doubled it six times, and each of them overflowed.
    reached = math.log2(job.engine._scale.value)
    assert len(repeats) == TOO_LARGE + 6 - reached > 9
    assert isinstance(job.recorder, Memory) and all(s.applied for s in job.recorder.steps)
    spent = job.recorder.steps[0].phase_seconds  # two dozen attempts, of which all count
    assert spent["forward"] + spent["backward"] > spent["other"]


def test_a_loss_that_is_not_finite_is_not_computed_again(tmp_path: Path) -> None:
    """Then no scale helps: the step is skipped and written down, and three in a row end the run."""
    job = make_job(toy_config(tmp_path, {"model.dtype": "fp16"}), ALONE)
    results: list[StepResult] = []
    step = job.engine.step

    def remembered(lr: float) -> StepResult:
        results.append(step(lr))
        return results[-1]

    with torch.no_grad():
        next(iter(job.engine._parameters)).fill_(math.nan)  # pyright: ignore[reportAttributeAccessIssue]
    with mock.patch.object(job.engine, "step", remembered), pytest.raises(TrainingStoppedError):
        train(job)
    assert [(r.applied, r.may_repeat) for r in results] == [(False, True)] * 3


def test_a_scale_is_halved_until_it_fits_and_doubled_when_it_has_for_long() -> None:
    scale = LossScale(enabled=True)
    first = scale.value
    assert scale.update(applied=False) and scale.value == first / 2
    for _ in range(GROWTH_STEPS):
        assert scale.value == first / 2
        assert not scale.update(applied=True)
    assert scale.value == first


def test_one_bad_window_halves_the_scale_once() -> None:
    """And never below 1, however many there are."""
    scale = LossScale(enabled=True)
    halvings = math.log2(scale.value)
    for window in range(1, 20):
        attempts = 1
        while scale.update(applied=False):
            attempts += 1
        expected = max(0.0, halvings - window)
        assert (math.log2(scale.value), attempts) == (expected, halvings - min(window, halvings + 1) + 2)


def test_a_scale_of_another_dtype_is_not_taken_over() -> None:
    half, whole = LossScale(enabled=True), LossScale(enabled=False)
    half.load_state_dict(whole.state_dict())
    whole.load_state_dict(half.state_dict())
    assert (half.value, whole.value) == (LossScale(enabled=True).value, 1.0)
