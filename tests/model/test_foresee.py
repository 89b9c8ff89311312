"""What `check` and `plan` refuse is what `train` refuses, in the same words, without a weight being read."""

from pathlib import Path

import pytest
from tiny_models import build

from burnish import preview
from burnish.config.schema import AdapterConfig, Config
from burnish.errors import ConfigError
from burnish.model.adapt import adapt
from burnish.plan import surely_apart


def config(folder: Path, family: str = "llama", **sections: dict | None) -> Config:
    """A config on a model folder that holds a config.json and nothing else."""
    build(family).config.save_pretrained(folder)
    values = {
        "model": {"path": str(folder)} | (sections.get("model") or {}),
        "data": {"train": "d.jsonl", "max_tokens": 64} | (sections.get("data") or {}),
        "adapter": sections.get("adapter"),
        "output_dir": "run",
    }
    return Config.model_validate(values)


def told(config: Config) -> str:
    return "\n".join(str(problem) for problem in preview._model_problems(config))


def refused(family: str, adapter: AdapterConfig | None, freeze: tuple[str, ...]) -> str:
    with pytest.raises(ConfigError) as caught:
        adapt(build(family), adapter, "none", freeze=freeze)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_target_that_is_none_is_told_as_train_tells_it(kind, family, tmp_path) -> None:
    adapter = {"kind": kind, "targets": ["nosuch", "q_prj"]}
    found = told(config(tmp_path, family, adapter=adapter))
    assert found == refused(family, AdapterConfig.model_validate(adapter), ()) != ""
    assert "nosuch" in found and "q_prj" in found


@pytest.mark.parametrize("adapter", [None, {"kind": "lora"}, {"kind": "pissa"}])
def test_a_frozen_part_that_is_none_is_told_as_train_tells_it(adapter, tmp_path) -> None:
    found = told(config(tmp_path, model={"freeze": ["nosuch"]}, adapter=adapter))
    ours = None if adapter is None else AdapterConfig.model_validate(adapter)
    assert found == refused("llama", ours, ("nosuch",)) != ""


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_names_that_are_there_pass(kind, tmp_path) -> None:
    adapter = {"kind": kind, "targets": ["q_proj", "down_proj"]}
    assert told(config(tmp_path, adapter=adapter, model={"freeze": ["lora_B"]})) == ""
    assert told(config(tmp_path, model={"freeze": ["embed_tokens"]})) == ""


@pytest.mark.parametrize("attention", ["auto", "flash_attention_2"])
@pytest.mark.parametrize("packing", ["auto", "off"])
def test_documents_beyond_the_last_position_are_told_with_all_else(packing, attention, tmp_path) -> None:
    data = {"max_tokens": 4096, "packing": packing}
    asked = config(tmp_path, "gpt2", data=data, model={"freeze": ["nosuch"], "attention": attention})
    assert "data.max_tokens: is 4096, but GPT2LMHeadModel knows 64 positions" in told(asked)
    assert "nosuch" in told(asked)
    with pytest.raises(ConfigError, match="64 positions"):
        preview._layout(asked)
    assert told(config(tmp_path, "gpt2", data={"packing": packing}, model={"attention": attention})) == ""


def test_the_usual_families_need_no_trial() -> None:
    assert surely_apart({"model_type": "llama"})
    assert not surely_apart({"model_type": "gpt2"})
    assert not surely_apart({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}})
