"""Vision-language models as text models: the language model alone gives the whole model's loss."""

from dataclasses import replace

import pytest
import torch
from tiny_models import gradients, make_documents, reference_loss
from tiny_vision import FAMILIES, build_vision

from breadth.batches import collate
from burnish.config.schema import AdapterConfig, Config, ModelConfig
from burnish.errors import ConfigError
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.foresee import shape_of
from burnish.model.forward import SupervisedModel
from burnish.model.load import load_model, load_model_config
from burnish.model.surrogate import build_surrogate
from burnish.model.vision import kept_names
from burnish.plan.memory import estimate_memory
from burnish.plan.shapes import ModelShape

LORA = AdapterConfig(kind="lora", rank=2, alpha=4)
LLAMA = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64) | {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
OF_VISION = ("visual", "vision", "connector", "projector")


def load(folder, **keys):
    return load_model(
        ModelConfig(path=str(folder), **keys), seed=1, init_context=None, param_dtype=torch.float32
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_its_loss_is_the_whole_models(tmp_path, family):
    whole = build_vision(family)
    whole.save_pretrained(tmp_path)
    model = load(tmp_path).eval()
    assert type(model) is type(whole)
    assert all(torch.equal(a, whole.state_dict()[n]) for n, a in model.state_dict().items())
    capability = can_isolate(model)
    assert capability.packed and capability.fused_head, capability.reason
    documents = make_documents()
    expected = reference_loss(whole.eval(), documents)
    expected.backward()
    theirs = gradients(whole)
    for packed in (True, False):
        loss = SupervisedModel(model, capability)(to_device(collate(documents, packed), torch.device("cpu")))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        ours = gradients(model)
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            assert torch.allclose(gradient, theirs[name], atol=1e-4, rtol=1e-4), name
    kept = kept_names(model)
    assert kept and all(any(part in name for part in OF_VISION) for name in kept)
    assert not any(part in name for name in ours for part in OF_VISION)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == kept


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_beside_the_language_model_is_planned_for(tmp_path, family):
    build_vision(family).save_pretrained(tmp_path)
    model = load(tmp_path)
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in kept_names(model)}
    shape = shape_of(load_model_config(ModelConfig(path=str(tmp_path))))
    assert shape.kept_params == sum(sizes.values()) > shape.kept_matrices > 0
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "d"}, "output_dir": "o"})
    without = replace(shape, kept_params=0, kept_matrices=0)
    more = [estimate_memory(config, s, 1, 64).device.weights for s in (shape, without)]
    # Trained in fp32 on one process, the vision part is loaded in it too.
    assert more[0] - more[1] == sum(p.nbytes for n, p in model.named_parameters() if n in sizes)


def test_a_vision_part_is_packed_in_4_bits_where_the_base_is_and_shared_out_by_zero_3():
    shape = ModelShape.from_config_json(LLAMA).beside(1000, 640)
    adapter = {"rank": 8, "quantize": "nf4"}
    for keys, ranks, wanted in (
        ({"adapter": {"rank": 8}}, 1, 2000),
        ({"adapter": adapter}, 1, 2 * 360 + 640 * (0.5 + 4 / 64)),
        ({"engine": {"kind": "deepspeed", "zero_stage": 3}}, 4, 500),
    ):
        base = {"model": {"path": "m"}, "data": {"train": "d"}, "output_dir": "o"}
        config = Config.model_validate(base | keys)
        with_it, without = (
            estimate_memory(config, s, ranks, 64).device.weights for s in (shape, shape.beside(0, 0))
        )
        assert with_it - without == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "gemma3"])
def test_the_trial_of_other_dtypes_has_a_small_vision_part(tmp_path, family):
    model = build_vision(family)
    small = build_surrogate(model.to(torch.bfloat16))
    assert small is not None
    layers = [n for n in kept_names(small) if ".1." in n and ("blocks" in n or "layers" in n)]
    assert not layers, "two layers of vision are left"
    assert can_isolate(model).packed


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "o_proj")])
def test_an_adapter_stays_in_the_language_model(tmp_path, targets):
    build_vision("llava").save_pretrained(tmp_path)  # whose vision part has a q_proj too
    model = adapt(load(tmp_path), LORA.model_copy(update={"targets": targets}), "none")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("language_model" in n and "lora_" in n for n in trained)
    per_layer = 7 if targets == "all-linear" else 2
    assert len(trained) == 2 * 2 * per_layer
    assert (".q_proj." in str(trained)) and ("down_proj" in str(trained)) is (targets == "all-linear")


def test_what_has_no_language_model_apart_is_refused(tmp_path, monkeypatch):
    build_vision("llava").save_pretrained(tmp_path)
    model = load(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("burnish.model.attention.verify_head", lambda model: False)
        with pytest.raises(ConfigError, match="other logits than the whole"):
            can_isolate(model)
    with monkeypatch.context() as patch:
        patch.setattr("burnish.model.vision.body_of", lambda model: None)
        with pytest.raises(ConfigError, match="no language model of its own"):
            load(tmp_path)
