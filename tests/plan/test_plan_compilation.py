"""When layers are compiled where the config leaves it to the plan, and how it is said."""

from typing import Any

import pytest

from burnish.config.schema import Config
from burnish.plan import ModelShape, WindowCounts, explain_auto, resolve_compile, train_flops
from burnish.plan.compilation import PAYS_FROM_FLOPS

SMALL = ModelShape.from_config_json({
    "model_type": "llama", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "intermediate_size": 1024, "vocab_size": 32000, "tie_word_embeddings": False,
})  # fmt: skip


def config(**sections: Any) -> Config:
    base: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "out"}
    return Config.model_validate(base | sections)


def counts(tokens: int, **changes: Any) -> WindowCounts:
    values: dict[str, Any] = {
        "num_steps": 100, "num_examples": 1000, "num_tokens": tokens, "num_supervised_tokens": tokens // 2,
        "num_examples_per_epoch": 1000, "steps_per_epoch": 100, "micro_batches_total": 100,
        "micro_batches_min": 1, "micro_batches_max": 1, "least_micro_batches_share": 1.0,
        "max_window_tokens": tokens // 100, "max_example_tokens": 500, "max_micro_tokens": 4096,
        "sum_squared_tokens": 0.0, "imbalance_mean": 0.0, "imbalance_max": 0.0, "imbalance_windows": 100,
        "examples_per_source": {"d": 1000}, "packed": True, "world_size": 1,
    }  # fmt: skip
    return WindowCounts(**(values | changes))


LONG, SHORT = counts(4_000_000), counts(400_000)


def compiles(asked: Config, found: WindowCounts = LONG, device_type: str = "cpu", able: bool = True) -> Any:
    return resolve_compile(asked, found, SMALL, device_type, able).model.compile


def test_long_runs_on_a_cpu() -> None:
    assert train_flops(config(), SHORT, SMALL) < PAYS_FROM_FLOPS < train_flops(config(), LONG, SMALL)
    assert compiles(config()) is True
    assert compiles(config(), SHORT) is False


def test_it_is_said_where_it_is_done() -> None:
    asked = config()
    told = [explain_auto(asked, resolve_compile(asked, c, SMALL, "cpu", True), None) for c in (LONG, SHORT)]
    assert ["model.compile: true" in " ".join(lines) for lines in told] == [True, False]


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"path": "m", "dtype": "fp32"}},
        {"model": {"path": "m", "activation_checkpointing": "light"}},
        {"model": {"path": "m", "mlp_tile_tokens": 512}},
        {"engine": {"sequence_parallel": 2}},
        {"engine": {"zero_stage": 3, "kind": "deepspeed"}},
    ],
)
def test_not_where_it_does_not_go_or_was_not_measured(sections: dict[str, Any]) -> None:
    assert compiles(config(**sections)) is False


def test_not_on_gpus_nor_for_padded_or_sharing_rows_nor_without_a_compiler() -> None:
    assert compiles(config(), device_type="cuda") is False
    assert compiles(config(), counts(4_000_000, packed=False)) is False
    assert compiles(config(), counts(4_000_000, num_computed_tokens=3_500_000)) is False
    assert compiles(config(), able=False) is False


@pytest.mark.parametrize("choice", [True, False])
def test_what_is_asked_for_stays(choice: bool) -> None:
    asked = config(model={"path": "m", "compile": choice})
    for found in (LONG, SHORT):
        assert compiles(asked, found, "cuda", able=False) is choice


def test_ranks_do_not_matter() -> None:
    """Resumed on another number of ranks, a run computes as it did."""
    assert compiles(config(), counts(4_000_000, world_size=4)) is True
