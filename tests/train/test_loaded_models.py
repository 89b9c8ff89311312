"""New tokens, and vision-language models, under every engine: one result, exported whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from burnish.export import merge
from burnish.export.folder import same_bits
from rig.grown import NEW_TOKENS, toy_qwen2_vl
from rig.spawn import run_cases
from rig.toy import VOCABULARY

LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
STAGES = {f"zero{stage}": {"engine.kind": "deepspeed", "engine.zero_stage": stage} for stage in range(4)}
LOCAL = {"engine.kind": "local"}
TRAINED: dict[str, dict[str, Any]] = {
    "full": {"kind": "grown", "multiple": 4, "settings": {}},
    "tied": {"kind": "grown", "multiple": 4, "tied": True, "settings": {}},
    "lora": {"kind": "grown", "settings": LORA},
    "tiedlora": {"kind": "grown", "tied": True, "settings": LORA},
    "pissa": {"kind": "grown", "settings": {"adapter": {"kind": "pissa", "rank": 4, "alpha": 8}}},
    "dora": {"kind": "grown", "settings": {"adapter": {"kind": "dora", "rank": 4, "alpha": 8}}},
    "vision": {"kind": "sighted", "settings": {"model.dtype": "fp32"}},
    "visionlora": {"kind": "sighted", "settings": {"model.dtype": "fp32", **LORA}},
}
ON_TWO = [(t, s) for t in ("full", "lora") for s in STAGES]
ON_TWO += [(t, "zero3") for t in ("tied", "tiedlora", "pissa", "dora", "vision", "visionlora")]
ON_TWO += [("vision", "zero2")]
BEGUN = ("lora", "tiedlora", "pissa", "dora", "visionlora")
BEGUN_ON_TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "begun-local": ("lora", LOCAL),
    **{f"begun-{stage}": ("lora", STAGES[stage]) for stage in STAGES},
    **{f"begun-{trained}": (trained, STAGES["zero3"]) for trained in BEGUN if trained != "lora"},
    "begun-bf16": ("lora", {**STAGES["zero3"], "model.dtype": "bf16"}),
}


def _case(trained: str, engine: dict[str, Any], **more: Any) -> dict[str, Any]:
    case = TRAINED[trained]
    return {**case, "settings": {**case["settings"], **engine}, **more}


def _begun(folder: Path, trained: str, engine: dict[str, Any]) -> dict[str, Any]:
    """A short run that begins with the adapter that one process trained."""
    settings = {"train.max_steps": 2, **engine}
    return {"kind": "begun", "folder": str(folder / "1" / trained), "settings": settings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loaded")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The reference: one process, plain PyTorch; and the same gone on with from step 3."""
    cases = {trained: _case(trained, LOCAL) for trained in TRAINED}
    cases["resumed"] = _case("tiedlora", LOCAL, resume_at=3)
    cases |= {f"begun-{trained}": _begun(folder, trained, LOCAL) for trained in BEGUN}
    return run_cases(cases, folder / "1", 1)


@pytest.fixture(scope="module")
def two(folder: Path, alone: dict[str, Any]) -> dict[str, Any]:
    cases = {f"{trained}-{stage}": _case(trained, STAGES[stage]) for trained, stage in ON_TWO}
    cases["resumed"] = _case("lora", STAGES["zero3"], resume_at=3)
    cases |= {name: _begun(folder, trained, more) for name, (trained, more) in BEGUN_ON_TWO.items()}
    return run_cases(cases, folder / "2", 2)


def _exported(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("final/*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("trained", "stage"), [*ON_TWO, ("lora", "resumed")])
def test_two_processes_export_what_one_does(trained, stage, alone, two, folder):
    name = stage if stage == "resumed" else f"{trained}-{stage}"
    expected, found = alone[trained], two[name]
    # A resumed run has logged its last steps only.
    assert found["losses"] == pytest.approx(expected["losses"][-len(found["losses"]) :], rel=5e-5)
    ours, theirs = _exported(folder / "2" / name), _exported(folder / "1" / trained)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.allclose(tensor, theirs[key], atol=2e-4, rtol=1e-3), key


def test_resumed_to_the_bit(alone, folder):
    assert alone["resumed"]["losses"] == alone["tiedlora"]["losses"][3:]
    ours, theirs = _exported(folder / "1/resumed"), _exported(folder / "1/tiedlora")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", BEGUN_ON_TWO)
def test_every_rank_begins_with_the_same_adapter(name, alone, two, folder):
    """Before a step every weight is that of the file, to the bit; and the steps are those of one process."""
    trained, _ = BEGUN_ON_TWO[name]
    given = _exported(folder / "1" / trained)
    for place in (folder / "2" / name, folder / "1" / f"begun-{trained}"):
        (file,) = place.glob("start/*.safetensors")
        start, end = load_file(file), _exported(place)
        assert start.keys() == given.keys() == end.keys()
        assert all(same_bits(start[key], given[key]) for key in given)
        assert not any(torch.equal(end[key].float(), given[key]) for key in given)
    expected, found = alone[f"begun-{trained}"]["losses"], two[name]["losses"]
    assert found == pytest.approx(expected, rel=2e-2 if name == "begun-bf16" else 5e-5)


@pytest.mark.parametrize("trained", ["full", "tied"])
def test_the_full_result_keeps_vllms_rules(trained, alone, folder):
    """Rows of embedding and head equal `vocab_size`, and every token has a row."""
    final = folder / "1" / trained / "final"
    vocabulary = json.loads((final / "config.json").read_text())["vocab_size"]
    assert vocabulary == 64 and vocabulary >= VOCABULARY + len(NEW_TOKENS)
    weights = _exported(folder / "1" / trained)
    assert weights["model.embed_tokens.weight"].shape[0] == vocabulary
    assert ("lm_head.weight" in weights) is (trained == "full")
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.get_output_embeddings().weight.shape[0] == vocabulary
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is (trained == "tied")


@pytest.mark.parametrize("trained", ["lora", "tiedlora"])
def test_an_adapter_brings_its_tokens(trained, alone, folder, tmp_path):
    final = folder / "1" / trained / "final"
    weights = _exported(folder / "1" / trained)
    rows = {name: t for name, t in weights.items() if "trainable_tokens_delta" in name}
    assert len(rows) == (2 if trained == "lora" else 1)
    base = load_file(folder / "1" / trained / "base/model.safetensors")["model.embed_tokens.weight"]
    for tensor in rows.values():
        assert tensor.shape == (2, base.shape[1])
    (embedding,) = (t for name, t in rows.items() if "embed_tokens" in name)
    assert (embedding - base.mean(0)).abs().max() > 1e-3, "the new rows were not trained"
    assert (embedding[0] - embedding[1]).abs().max() > 1e-3
    model = AutoPeftModelForCausalLM.from_pretrained(final).eval()
    ids = torch.tensor([[3, NEW_TOKENS[0], 5, NEW_TOKENS[1], 7]])
    proof = merge(final, tmp_path / "merged", "fp32")
    assert proof.max_abs_logit < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)
    assert merged.config.vocab_size == VOCABULARY + 2
    assert torch.equal(merged.get_input_embeddings().weight[list(NEW_TOKENS)], embedding)


def test_the_vision_part_comes_out_to_the_bit(alone, folder):
    out = folder / "1" / "vision"
    before = AutoModelForImageTextToText.from_pretrained(out / "base", dtype="auto")
    after = AutoModelForImageTextToText.from_pretrained(out / "final", dtype="auto")
    assert type(after) is type(before) is type(toy_qwen2_vl())
    ours, theirs = _exported(out), load_file(out / "base/model.safetensors")
    assert ours.keys() == theirs.keys()
    seen = [name for name in theirs if "visual" in name]
    assert len(seen) == 31
    for name in theirs:
        if name in seen:
            assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.bfloat16, name
        else:
            assert ours[name].dtype == torch.float32 and not torch.equal(ours[name], theirs[name].float()), (
                name
            )
    assert (out / "final/preprocessor_config.json").read_text() == '{"made": "up"}'


def test_an_adapter_stays_out_of_the_vision_part(alone, folder, tmp_path):
    final = folder / "1" / "visionlora" / "final"
    weights = _exported(final.parent)
    assert weights and not any("visual" in name for name in weights)
    proof = merge(final, tmp_path / "merged", "fp32")
    assert proof.max_abs_logit < 1e-4
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(toy_qwen2_vl())
