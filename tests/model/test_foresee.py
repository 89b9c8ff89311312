"""What `check` and `plan` refuse is what `train` refuses, in the same words, without a weight being read."""

from pathlib import Path

import pytest
from tiny_models import build

from burnish import preview
from burnish.config.schema import AdapterConfig, Config, OptimConfig
from burnish.engine.optimizer import build_param_groups
from burnish.errors import ConfigError
from burnish.model.adapt import adapt
from burnish.model.attention import Capability
from burnish.model.forward import SupervisedModel
from burnish.plan import surely_apart


def config(folder: Path, family: str = "llama", **sections: dict | None) -> Config:
    """A config on a model folder that holds a config.json and nothing else."""
    build(family).config.save_pretrained(folder)
    values = {
        "model": {"path": str(folder)} | (sections.get("model") or {}),
        "data": {"train": "d.jsonl", "max_tokens": 64} | (sections.get("data") or {}),
        "adapter": sections.get("adapter"),
        "optim": sections.get("optim") or {},
        "train": sections.get("train") or {},
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


def test_what_only_a_look_at_the_model_tells_is_told_before_its_weights_are_read(tmp_path) -> None:
    asked = config(tmp_path, optim={"group_lr": {"nosuch": 2}}, train={"router_aux_loss": "auto"})
    assert "train.router_aux_loss: is auto, but a llama model has no balancing loss" in told(asked)
    parts = {"group_lr": {"nosuch": 2.0, "embed_tokens": 0.1}}
    with pytest.raises(ConfigError) as by_train:
        build_param_groups(
            SupervisedModel(adapt(build("llama"), None, "none"), Capability(False, "eager", "")),
            OptimConfig.model_validate(parts),
        )
    assert told(config(tmp_path, optim=parts)) == str(by_train.value) != ""
    with pytest.raises(ConfigError):
        preview._require_parts(config(tmp_path, optim=parts))  # which plan asks too
    adapter = {"kind": "dora"}
    assert told(config(tmp_path, adapter=adapter, optim={"group_lr": {"lora_B": 16, "layers.0": 2}})) == ""
    assert "nothing trained is called 'embed_tokens'" in told(config(tmp_path, adapter=adapter, optim=parts))
    assert told(config(tmp_path, "mixtral", train={"router_aux_loss": "auto"})) == ""


@pytest.mark.parametrize("adapter", [{"kind": "dora"}, {"kind": "pissa"}, {"dropout": 0.1}])
def test_an_adapter_that_fused_experts_cannot_have_is_told_as_train_tells_it(adapter, tmp_path) -> None:
    assert told(config(tmp_path, "mixtral", adapter=adapter)) == refused(
        "mixtral", AdapterConfig.model_validate(adapter), ()
    )


@pytest.mark.parametrize("model", [{"mlp_tile_tokens": 64}, {"activation_checkpointing": "light"}])
def test_layers_that_cannot_be_computed_again_so_are_told(model, tmp_path) -> None:
    with pytest.raises(ConfigError) as by_train:
        level = model.get("activation_checkpointing", "none")
        adapt(build("gpt_oss"), None, level, mlp_tile_tokens=model.get("mlp_tile_tokens"))
    assert told(config(tmp_path, "gpt_oss", model=model)) == str(by_train.value) != ""
    assert told(config(tmp_path, "llama", model=model)) == ""


def test_beginnings_that_cannot_be_shared_are_told(tmp_path) -> None:
    on = {"share_prefix": "on"}
    assert "data.share_prefix: is on, but the model's sliding window" in told(
        config(tmp_path, "mistral", data=on)
    )
    assert told(config(tmp_path, data=on)) == ""


def test_the_usual_families_need_no_trial() -> None:
    assert surely_apart({"model_type": "llama"})
    assert not surely_apart({"model_type": "gpt2"})
    assert not surely_apart({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}})
