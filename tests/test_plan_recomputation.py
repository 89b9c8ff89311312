"""Which recomputation `auto` takes, and what the plan says that each level keeps."""

from __future__ import annotations

import pytest

from burnish.config.schema import Config
from burnish.plan import ModelShape, estimate_memory, resolve_auto
from burnish.plan.recomputation import choose_recomputation, with_recomputation

SHAPE = ModelShape.from_config_json(
    {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
    }
)
TOKENS = 4096


def config(level: str = "auto", **model: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m", "activation_checkpointing": level, **model},
            "data": {"train": "d.jsonl", "max_tokens": TOKENS},
            "output_dir": "out",
        }
    )


def needed(level: str, tokens: int = TOKENS, **model: object) -> int:
    return estimate_memory(config(level, **model), SHAPE, 1, tokens).device.total


def test_levels_lie_in_order() -> None:
    assert needed("none") > needed("light") > needed("full") > needed("offload")
    kept = estimate_memory(config("offload"), SHAPE, 1, TOKENS).host_bytes
    assert kept == 22 * TOKENS * 2048 * 4


@pytest.mark.parametrize("level", ["none", "light", "full"])
def test_auto_takes_the_fastest_that_fits(level: str) -> None:
    assert choose_recomputation(config(), SHAPE, 1, float(needed(level))) == level
    assert choose_recomputation(config(), SHAPE, 1, needed(level) - 1.0) != level or level == "full"


def test_auto_on_a_cpu_and_where_nothing_fits() -> None:
    assert choose_recomputation(config(), SHAPE, 1, None) == "none"
    assert choose_recomputation(config(), SHAPE, 1, 0.0) == "full"


def test_auto_has_room_for_the_micro_batches_that_were_asked_for() -> None:
    batch = {"batch": {"micro_tokens": 2 * TOKENS}}
    asked = Config.model_validate({**config().model_dump(), **batch})
    room = float(needed("none"))
    assert room < needed("none", 2 * TOKENS)
    assert choose_recomputation(config(), SHAPE, 1, room) == "none"
    assert choose_recomputation(asked, SHAPE, 1, room) != "none"


def test_resolved() -> None:
    memory = int(needed("light") / 0.92) + 1
    resolved = resolve_auto(config(), SHAPE, 1, memory)
    assert resolved.model.activation_checkpointing == "light"
    assert with_recomputation(config(), "full") == config("full")


@pytest.mark.parametrize("level", ["none", "light", "full", "offload"])
def test_tiles_take_less_where_a_forward_is_long(level: str) -> None:
    long = 65_536
    assert needed(level, long, mlp_tile_tokens=2048) < needed(level, long)
    assert needed(level, 2048, mlp_tile_tokens=2048) == needed(level, 2048)
