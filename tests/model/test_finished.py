"""A finished model is loaded as it was trained, or not at all: peft and transformers alone only warn."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from burnish.errors import BurnishError, ConfigError, MachineError
from burnish.export import merge
from burnish.model.finished import load_finished, load_finished_tokenizer
from burnish.talk import Speaker


def llama(num_layers: int = 2, width: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
        )
    )


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    words = {f"w{i}": i for i in range(16)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path, base) -> Path:
    """As peft alone saves one: without a tokenizer."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def say(adapter: Path, **changes) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_that_peft_saved_has_its_base_s_tokenizer(tmp_path, adapter, base):
    assert load_finished_tokenizer(str(adapter)).get_vocab() == load_finished_tokenizer(str(base)).get_vocab()
    assert merge(adapter, tmp_path / "merged", "fp32").same_top_token == 1
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("num_layers", "width", "message"),
    [(1, 16, "4 weights have no place there"), (3, 16, "4 weights are missing"), (2, 32, "size mismatch")],
)
def test_an_adapter_of_another_base_is_refused(tmp_path, adapter, num_layers, width, message):
    other = tmp_path / "other"
    llama(num_layers, width).save_pretrained(other)
    say(adapter, base_model_name_or_path=str(other))
    with pytest.raises(ValueError, match=message):
        load_finished(str(adapter))
    with pytest.raises(ConfigError, match=f"not an adapter of .*{message}"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("which", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_file_that_was_cut_off_is_named(tmp_path, adapter, which):
    file = tmp_path / which
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MachineError, match=rf"{which} cannot be read.*\n.*incomplete download"):
        load_finished(str(adapter))


def test_weights_that_would_be_random_are_refused(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(MachineError, match="9 weights are missing and would be random"):
        load_finished(str(base))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "adapter_config.json is not JSON"),
        ("[]", "names no base"),
        ('{"peft_type": "LORA"}', "names no base"),
        ('{"peft_type": "X", "r": 1}', "none of peft's"),
    ],
)
def test_an_adapter_s_config_that_is_none_is_said(tmp_path, adapter, base, text, says):
    content = json.dumps({**json.loads(text), "base_model_name_or_path": str(base)}) if "X" in text else text
    (adapter / "adapter_config.json").write_text(content)
    for use in (lambda: merge(adapter, tmp_path / "merged"), lambda: Speaker(str(adapter))):
        with pytest.raises(BurnishError, match=says):
            use()
