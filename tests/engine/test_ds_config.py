"""The dict that DeepSpeed gets: the step recipe, whatever else is asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from burnish.config.raw_deepspeed import TUNABLE, misspelt_settings, refused_settings, unknown_settings
from burnish.engine import ds_checkpoint
from burnish.engine.ds_config import deepspeed_config
from burnish.engine.ds_workarounds import add_without_copy, convert_to_universal, measure_by_rows
from burnish.errors import CheckpointError
from burnish.runtime import Ranks
from rig.toy import toy_config


def built(settings: dict[str, Any], num_gpus: int = 0) -> dict[str, Any]:
    return deepspeed_config(toy_config("out", settings), num_gpus)


@pytest.mark.parametrize("num_gpus", [0, 1, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_communication_is_overlapped_where_it_can_be(stage: int, num_gpus: int) -> None:
    """DeepSpeed refuses to start at stage 1 with it: `managed_gradient_accumulation` is off."""
    overlaps = built({"engine.zero_stage": stage}, num_gpus)["zero_optimization"]["overlap_comm"]
    assert overlaps == (stage > 1 and num_gpus > 1)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_recipe_is_always_there(stage: int, dtype: str) -> None:
    settings = built({"engine.zero_stage": stage, "model.dtype": dtype})
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["managed_gradient_accumulation"] is False
    assert settings["zero_optimization"]["stage"] == stage
    assert "optimizer" not in settings
    assert "scheduler" not in settings
    assert settings["gradient_clipping"] == (1.0 if stage else 0.0)  # without ZeRO we clip ourselves


def test_precision() -> None:
    fp32 = built({"model.dtype": "fp32"})
    assert not {"bf16", "fp16", "torch_autocast"} & fp32.keys()
    bf16 = built({"model.dtype": "bf16"})
    assert bf16["bf16"]["enabled"]
    assert bf16["data_types"] == {"grad_accum_dtype": "fp32"}
    plain = built({"model.dtype": "bf16", "engine.zero_stage": 0})
    assert plain["torch_autocast"]["enabled"]
    assert "bf16" not in plain
    fp16 = built({"model.dtype": "fp16"})
    assert fp16["fp16"]["loss_scale"] == 2**12
    assert fp16["data_types"] == {"grad_accum_dtype": "fp32"}
    assert built({"model.dtype": "fp16", "engine.zero_stage": 0})["torch_autocast"]["dtype"] == "float16"


def test_no_clipping_is_zero() -> None:
    assert built({"optim.max_grad_norm": None})["gradient_clipping"] == 0.0


def test_offload() -> None:
    settings = built(
        {"engine.zero_stage": 3, "engine.offload_optimizer": "nvme", "engine.offload_params": "cpu"},
        num_gpus=1,
    )
    zero = settings["zero_optimization"]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_optimizer"]["nvme_path"].endswith("out/.offload")
    assert "aio" in settings


def test_hpz() -> None:
    zero = built({"engine.zero_stage": 3, "engine.hpz_size": 4})["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 4


def test_raw_settings_come_over_ours() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": 7, "round_robin_gradients": True}, "dump_state": True}
    plain, settings = built({}), built({"engine.deepspeed": raw})
    assert settings.pop("dump_state") is True
    zero = settings.pop("zero_optimization")
    assert zero == {**plain.pop("zero_optimization"), **raw["zero_optimization"]}
    assert settings == plain


def test_every_setting_of_the_recipe_is_refused_as_a_raw_one() -> None:
    """Whatever we write outside the sections that may be tuned cannot be written over."""
    tuned = {"zero_optimization", "aio", "timers"}
    for dtype in ("bf16", "fp16", "fp32"):
        for stage in (0, 2):
            ours = built({"model.dtype": dtype, "engine.zero_stage": stage}).keys() - tuned
            refused = [p.where for p in refused_settings({key: {} for key in ours})]
            assert sorted(refused) == sorted(f"engine.deepspeed.{key}" for key in ours)


def test_nvme() -> None:
    nvme = {"engine.zero_stage": 3, "engine.offload_optimizer": "nvme"}
    zero = built(nvme)["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"].endswith("out/.offload")
    elsewhere = built({**nvme, "engine.nvme_path": "/fast"})["zero_optimization"]["offload_optimizer"]
    other = deepspeed_config(toy_config("other/out", {**nvme, "engine.nvme_path": "/fast"}), 0)
    assert elsewhere["nvme_path"].startswith("/fast/out-")
    # Two runs on one disk do not write over each other.
    assert elsewhere["nvme_path"] != other["zero_optimization"]["offload_optimizer"]["nvme_path"]


def test_misspelt_settings_are_told_without_deepspeed() -> None:
    raw = {"zero_optimization": {"reduce_bucket_sise": 7, "something_of_tomorrow": 1}}
    (problem,) = misspelt_settings(raw)
    assert problem.where == "engine.deepspeed.zero_optimization.reduce_bucket_sise"
    assert "reduce_bucket_size" in str(problem)


def test_unknown_settings_are_told_by_the_deepspeed_that_is_installed() -> None:
    pytest.importorskip("deepspeed")
    from burnish.engine.deepspeed import known_zero_settings

    known = known_zero_settings()
    assert set(known) == TUNABLE
    raw = {"something_else": 1, "offload_param": {"bufer_size": 1, "max_in_cpu": 0}, "overlap_comm": True}
    found = [(p.where, p.cure) for p in unknown_settings(raw, known, "zero")]
    assert found == [
        ("zero.something_else", "Take it out."),
        ("zero.offload_param.bufer_size", "Did you mean buffer_size?"),
    ]


def test_zero_measures_and_adds_up_without_copies() -> None:
    """The names that the workarounds replace are DeepSpeed's, and what they put there gives the same."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert hasattr(DeepSpeedZeroOptimizer, "_add_to_grad_partition_buffer")
    assert hasattr(DeepSpeedZeroOptimizer, "get_grad_norm_direct")
    assert hasattr(DeepSpeedZeroOptimizer_Stage3, "get_grad_norm_direct")

    def norm_of(gradients: list[torch.Tensor], params: list[str], norm_type: int) -> torch.Tensor:
        assert len(gradients) == len(params) and all(len(g) < 5 for g in gradients)
        return torch.linalg.vector_norm(torch.cat(gradients), norm_type)

    padding = torch.zeros(7)
    setattr(padding, "_zero_padding", True)  # noqa: B010 (an attribute that tensors do not have)
    gradients = [torch.randn(3, 4096), torch.randn(10), torch.zeros(0), padding]
    zero = SimpleNamespace(get_grad_norm_direct=norm_of, _add_to_grad_partition_buffer=None)
    measure_by_rows(zero)
    add_without_copy(zero)
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]).double())
    assert zero.get_grad_norm_direct(gradients, ["a", "b", "c"]).item() == pytest.approx(expected.item())
    total, part = torch.randn(5), torch.randn(5).bfloat16()
    right = total + part.float()
    zero._add_to_grad_partition_buffer(total, part)
    zero._add_to_grad_partition_buffer(None, part)  # another rank's part
    assert torch.equal(total, right)


@pytest.mark.parametrize(
    ("stderr", "said"), [("", "exit code -9"), ("a warning\nno space left\n", "no space left")]
)
def test_a_conversion_that_failed_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stderr: str, said: str
) -> None:
    """Without a word too: what the system kills for its memory prints nothing."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, "", stderr))
    failure = convert_to_universal(tmp_path / "shards", tmp_path / "converted" / "universal")
    assert failure is not None and said in failure


def test_a_checkpoint_is_only_read_when_it_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another run's, lie on a disk that is read only, and be gone on from by others meanwhile."""

    def convert(shards: Path, target: Path) -> str | None:
        target.mkdir(parents=True)
        return failure

    monkeypatch.setattr(ds_checkpoint, "convert_to_universal", convert)
    saved, run_dir = tmp_path / "other" / "checkpoints" / "step-00000002" / "engine", tmp_path / "run"
    saved.mkdir(parents=True)
    failure = None
    with ds_checkpoint.as_universal(Mock(), saved, run_dir, Ranks(0, 0, 1)) as converted:
        assert converted.is_relative_to(run_dir)
        assert [path.name for path in saved.parent.parent.iterdir()] == ["step-00000002"]
    failure = "the disk is full"
    with (
        pytest.raises(CheckpointError, match="disk is full"),
        ds_checkpoint.as_universal(Mock(), saved, run_dir, Ranks(0, 0, 1)),
    ):
        pass
    assert list((run_dir / "checkpoints").iterdir()) == []
