"""Loading: every weight accounted for, fresh weights by seed alone, one clear error for each mistake."""

import json

import pytest
import torch
from tiny_models import build, make_documents
from transformers import AutoConfig

from breadth.batches import collate
from burnish.config.check import check_config
from burnish.config.schema import AdapterConfig, Config, ModelConfig
from burnish.config.stored_weights import cannot_train_stored
from burnish.errors import ConfigError, MachineError
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.model.load import load_model


def load(path, vocabulary=None, param_dtype=torch.float32, seed=1, **keys):
    quantize = keys.pop("quantize", None)
    return load_model(
        ModelConfig(path=str(path), **keys),
        seed=seed,
        init_context=None,
        param_dtype=param_dtype,
        quantize=quantize,
        vocabulary=vocabulary,
    )


@pytest.fixture
def folder(tmp_path):
    build("qwen2").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_pretrained_weights_come_back_and_stay_tied(folder):
    model = load(folder)
    saved = build("qwen2").state_dict()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in saved.items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_weights_follow_from_the_seed_alone(tmp_path, dtype):
    AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, vocab_size=97).save_pretrained(tmp_path)  # fmt: skip
    torch.manual_seed(5)
    one = load(tmp_path, init="random", param_dtype=dtype)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    two = load(tmp_path, init="random", param_dtype=dtype)
    other = load(tmp_path, init="random", param_dtype=dtype, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight.dtype == dtype
    assert 0.015 < one.lm_head.weight.float().std() < 0.025  # initializer_range, not PyTorch's default
    assert one.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state), "loading must not consume random numbers"


def test_missing_leftover_and_misshapen_weights_are_named(folder):
    def change(weights):
        del weights["model.norm.weight"]
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 32)
        weights["model.extra.weight"] = torch.zeros(2)

    rewrite(folder, change)
    with pytest.raises(MachineError) as caught:
        load(folder)
    text = str(caught.value)
    assert "missing" in text and "model.norm.weight" in text
    assert "another shape" in text and "model.layers.0.mlp.up_proj.weight" in text
    assert "no part of the model" in text and "model.extra.weight" in text


def test_code_that_reads_weights_while_it_loads_in_parts_is_refused(folder, monkeypatch):
    def from_pretrained(*_, **__):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(IndexError):
        load(folder)
    monkeypatch.setattr("burnish.model.load.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match=r"qwen2 in parts.*\n?.*zero_stage: 2") as caught:
        load(folder)
    assert "engine.zero_stage" in str(caught.value)


def test_pickle_only_and_empty_folders_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickle"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match="init: random"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", None])
def test_a_file_of_weights_that_is_not_whole(folder, content):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(MachineError, match=r"model\.safetensors cannot be read"):
        load(folder)


def test_an_adapter_in_the_models_folder_is_refused(folder):
    """transformers would load both as one model, without a weight to train."""
    (folder / "adapter_config.json").write_text("{}")

    def problems(**model):
        raw = {"model": {"path": str(folder), **model}, "data": {"train": __file__}, "output_dir": "runs/x"}
        return [str(problem) for problem in check_config(Config.model_validate(raw))]

    assert "an adapter beside the model" in "".join(problems())
    assert problems(init="random") == []
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "is an adapter, not a model" in "".join(problems())


FP4 = {"quant_method": "mxfp4"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("packing", "init", "quantize", "problem"),
    [
        (None, "pretrained", "nf4", None),
        (FP4, "pretrained", None, None),
        (FP4, "pretrained", "nf4", "Leave it out"),
        (NF4, "pretrained", "nf4", None),
        (NF4, "pretrained", None, "adapter.quantize: nf4"),
        (NF4 | {"load_in_4bit": False, "load_in_8bit": True}, "pretrained", "nf4", "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "pretrained", None, "gptq"),
        ({"quant_method": "gptq", "bits": 4}, "random", None, None),
    ],
)
def test_weights_that_are_stored_in_fewer_bits(packing, init, quantize, problem):
    for values in ({"quantization_config": packing}, {"text_config": {"quantization_config": packing}}):
        found = cannot_train_stored(values, init, quantize)
        assert (found is None) if problem is None else problem in str(found)


def test_what_is_loaded_from_fewer_bits_is_whole(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(ConfigError, match="gptq"):
        load(folder)
    # Of fresh weights a config.json must not say that they are packed: nobody could load them.
    assert not hasattr(load(folder, init="random").config, "quantization_config")
    fp8 = {"quant_method": "fp8", "modules_to_not_convert": ["model", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    model = load(folder)
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("sizes", [{"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}, {}])
def test_evaluation_leaves_a_base_in_4_bits_as_it_was(tmp_path, sizes):
    """A CPU with AVX512-BF16 is needed to see what bitsandbytes does otherwise."""
    pytest.importorskip("bitsandbytes")
    build("llama", **sizes).save_pretrained(tmp_path)
    base = load(tmp_path, param_dtype=torch.bfloat16, quantize="nf4", dtype="bf16")
    model = adapt(base, AdapterConfig(rank=2, alpha=4, quantize="nf4"), "none")
    capability = can_isolate(model)
    supervised = SupervisedModel(model, capability)
    batch = to_device(collate(make_documents(), capability.packed), torch.device("cpu"))

    def gradients():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            supervised.train()(batch).backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    before = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        supervised.eval()(batch, per_document=True)
    assert before and all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_not_a_causal_language_model(folder, tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        load("./not/there")
    with pytest.raises(ConfigError, match="no model of that name in the cache"):
        load("nobody/nothing")
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="encoder-decoder"):
        load(tmp_path / "t5", init="random")
    AutoConfig.for_model("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match="no causal language model"):
        load(tmp_path / "vit", init="random")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "from_tomorrow"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="from_tomorrow"):
        load(folder)


def test_gradients_pass_through_a_base_in_4_bits_after_an_evaluation(folder, monkeypatch):
    pytest.importorskip("bitsandbytes")
    # Any CPU stands for one with AVX512-BF16; whose layout it would be is not asked for again.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layer = load(folder, quantize="nf4").model.layers[0].mlp.up_proj
    width = layer.in_features
    with torch.no_grad():
        layer.eval()(torch.ones(1, width))
    hidden = torch.ones(1, width, requires_grad=True)
    layer.train()(hidden).sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_quantising_needs_weights_and_the_package(folder, monkeypatch):
    with pytest.raises(ConfigError, match="nf4"):
        load(folder, init="random", quantize="nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"burnish\[bitsandbytes\]"):
        load(folder, quantize="nf4")
