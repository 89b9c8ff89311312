"""Exports load with transformers and peft alone, say what was trained, and are proved."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from burnish.config.load import load_config
from burnish.errors import ConfigError, MachineError
from burnish.export import ExportFacts, export_final, merge
from burnish.export.card import public_name
from burnish.export.chat import end_of_turn_ids, generation_config, save_tokenizer
from burnish.export.folder import prove_weights, whole_folder
from burnish.model.finished import load_finished

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
FACTS = ExportFacts(3, 12, 99, {"evaluation loss": 1.25})


@pytest.fixture
def tokenizer():
    words = {w: i for i, w in enumerate(["<unk>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "a", "b"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = ["<|user|>", "<|assistant|>", "<|end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", additional_special_tokens=extra
    )


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            eos_token_id=6,  # a plain word of the tokenizer here
        )
    )


def config_for(folder, *flags: str):
    rows = folder / "rows.jsonl"
    rows.write_text("{}\n")
    base = folder / "base-model"
    base.mkdir(exist_ok=True)
    llama(False).save_pretrained(base)
    return load_config(
        None,
        ["--model.path", str(base), "--data.train", str(rows), "--output_dir", str(folder / "run"), *flags],
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_full_weights_come_back_bit_for_bit(tmp_path, tokenizer, tied, dtype):
    model = llama(tied)
    out = export_final(
        config_for(tmp_path, "--model.dtype", dtype),
        model,
        model.state_dict(),
        tokenizer,
        TEMPLATE,
        tmp_path / "run/final",
        FACTS,
    )
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == wanted
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(wanted)), name
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied
    saved = json.loads((out / "config.json").read_text())
    assert saved.get("use_cache") is not False
    assert "burnish" not in (out / "config.json").read_text()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [4, 1]
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert sorted(p.name for p in out.parent.iterdir()) == ["final"]
    card = (out / "README.md").read_text()
    assert "1.25" in card and str(tmp_path) not in card


def test_an_older_export_is_replaced_whole(tmp_path, tokenizer):
    model = llama(False)
    out = tmp_path / "run/final"
    out.mkdir(parents=True)
    (out / "leftover.txt").write_text("old")
    export_final(config_for(tmp_path), model, model.state_dict(), tokenizer, None, out, FACTS)
    assert not (out / "leftover.txt").exists()


def test_adapter_alone_and_merged(tmp_path, tokenizer):
    config = config_for(tmp_path, "--adapter.rank", "2", "--model.dtype", "fp32")
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    weights = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    out = export_final(config, model, weights, tokenizer, TEMPLATE, tmp_path / "run/final", FACTS)
    assert not (out / "model.safetensors").exists()
    ids = torch.tensor([[2, 5, 4, 3, 6]])
    wanted = model(ids).logits
    again = AutoPeftModelForCausalLM.from_pretrained(out)
    assert torch.equal(again(ids).logits, wanted)
    # The base's config names a token that is a plain word here.
    assert GenerationConfig.from_pretrained(out).eos_token_id == [4, 1]
    assert load_finished(str(out)).generation_config.eos_token_id == [4, 1]
    proof = merge(out, tmp_path / "merged", "fp32")
    assert proof.max_abs_logit < 1e-4 and proof.max_kl < 1e-8 and proof.same_top_token == 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(ids).logits, wanted, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE
    with pytest.raises(ConfigError, match="already"):
        merge(out, tmp_path / "merged")
    with pytest.raises(ConfigError, match="not an adapter"):
        merge(tmp_path / "merged", tmp_path / "again")
    rough = merge(out, tmp_path / "merged-bf16", "bf16")
    assert proof.max_abs_logit < rough.max_abs_logit < 0.5
    # Saved by peft alone, an adapter has no tokenizer.
    tokenizer.save_pretrained(config.model.path)
    for file in out.glob("*token*"):
        file.unlink()
    assert merge(out, tmp_path / "merged-with-bases-tokenizer", "fp32") == proof


def test_an_adapter_that_is_not_finite_is_refused(tmp_path, tokenizer):
    config = config_for(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    damaged = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: w + float("nan") for name, w in load_file(damaged).items()}, damaged)
    with pytest.raises(ConfigError, match="cannot be merged: NaNs"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_fresh_base_brings_its_base(tmp_path, tokenizer):
    flags = ["--adapter.rank", "2", "--model.init", "random", "--model.dtype", "fp32"]
    config = config_for(tmp_path, *flags)
    from burnish.model.load import load_model

    fresh = load_model(
        config.model,
        seed=config.train.seed,
        init_context=None,
        param_dtype=torch.float32,
    )
    model = get_peft_model(fresh, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    out = export_final(config, model, weights, tokenizer, None, tmp_path / "run/final", FACTS)
    ids = torch.tensor([[2, 5, 4]])
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(out)(ids).logits, model(ids).logits)


def test_a_fresh_base_of_another_seed_is_not_taken_for_ones_own(tmp_path, tokenizer):
    """Both runs' adapters are to be loaded on the weights that they were trained beside."""
    fresh = ["--adapter.rank", "2", "--model.init", "random", "--model.dtype", "fp32"]
    found = []
    for seed, name in (("1", "best"), ("2", "final"), ("2", "best"), ("1", "final")):
        config = config_for(tmp_path, *fresh, "--train.seed", seed)
        model = get_peft_model(llama(False), LoraConfig(r=2, target_modules="all-linear"))
        weights = {n: t for n, t in model.state_dict().items() if "lora_" in n}
        out = export_final(config, model, weights, tokenizer, None, tmp_path / "run" / name, FACTS)
        path = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
        found.append(path.rpartition("/")[2])
    assert found == ["base", "base-2", "base-2", "base"]


@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "q_proj"]])
def test_pissa_comes_out_as_a_lora_of_the_published_base(targets, tmp_path, tokenizer):
    config = config_for(tmp_path, "--adapter.rank", "2", "--adapter.kind", "pissa", "--model.dtype", "fp32")
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    lora = LoraConfig(
        r=2, lora_alpha=3, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights="pissa"
    )
    model = get_peft_model(base, lora)
    start = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    out = export_final(
        config, model, weights, tokenizer, None, tmp_path / "run/final", FACTS, pissa_start=start
    )
    ids = torch.tensor([[2, 5, 4, 3, 6]])
    again = AutoPeftModelForCausalLM.from_pretrained(out)
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    published = AutoModelForCausalLM.from_pretrained(config.model.path)
    assert not torch.allclose(published(ids).logits, model(ids).logits, atol=1e-2)


def test_the_proof_sees_damage(tmp_path):
    good = {"a": torch.ones(4), "b": torch.zeros(2)}
    save_file(good, tmp_path / "model.safetensors")
    assert prove_weights(tmp_path, good) == set()
    with pytest.raises(MachineError, match="differs"):
        prove_weights(tmp_path, {**good, "a": torch.ones(4) * (1 + 2**-20)})
    with pytest.raises(MachineError, match="missing"):
        prove_weights(tmp_path, {**good, "c": torch.ones(1)})
    save_file({**good, "b": torch.zeros(0)}, tmp_path / "model.safetensors")
    with pytest.raises(MachineError, match="no elements"):
        prove_weights(tmp_path, good)


def test_a_failed_export_leaves_the_old_one(tmp_path):
    (tmp_path / "final").mkdir()
    with pytest.raises(KeyError), whole_folder(tmp_path / "final") as staging:
        (staging / "x").write_text("x")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_full_disk_is_an_error_of_the_machine(tmp_path, small_files):
    with (
        pytest.raises(MachineError, match=r"cannot be written: .*too large"),
        whole_folder(tmp_path / "final") as to,
    ):
        save_file({"a": torch.zeros(small_files)}, to / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_tokenizer_is_one_too(tmp_path, small_files):
    """tokenizers has a plain Exception for it."""
    words = {f"word {i}": i for i in range(small_files // 10)}
    large = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word 0")))
    with pytest.raises(MachineError, match="cannot be written"), whole_folder(tmp_path / "final") as to:
        save_tokenizer(large, None, to)
    assert list(tmp_path.iterdir()) == []


def test_end_of_turn(tokenizer):
    assert end_of_turn_ids(tokenizer, TEMPLATE) == [4]
    assert end_of_turn_ids(tokenizer, None) == []
    assert end_of_turn_ids(tokenizer, "{{ raise_exception('no') }}") == []


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"min_p": 0.05}, {"do_sample": True, "min_p": 0.05}),
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False}),
        ({"temperature": 0.0}, {}),
        ({"top_k": 50}, {"do_sample": False, "top_k": 50}),
        ({"num_beams": 1, "early_stopping": True}, {"do_sample": False, "num_beams": 1}),
        ({"output_scores": True, "length_penalty": 2.0}, {"do_sample": False}),
        ({"pad_token_id": -1}, {"do_sample": False}),
    ],
)
def test_whatever_a_base_says_of_generation_can_be_saved(tmp_path, tokenizer, flags, kept):
    """transformers loads all of these, and refuses to save some; greedy bases stay greedy."""
    (tmp_path / "generation_config.json").write_text(json.dumps(flags))
    base = GenerationConfig.from_pretrained(tmp_path)
    generation_config(base, tokenizer, TEMPLATE).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    saved.pop("transformers_version", None)
    assert saved == {**kept, "eos_token_id": [4, 1], "pad_token_id": 4}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("https://user:secret@host/d.jsonl?token=abc", "https://host/d.jsonl"),
        ("/home/somebody/d.jsonl", "d.jsonl"),
        ("org/name", "org/name"),
    ],
)
def test_cards_name_no_secret(path, name):
    assert public_name(path) == name
