"""What `auto` chooses from the memory plan, on GPUs and on a CPU, and how it says so."""

from pathlib import Path

import pytest

from burnish.config.schema import Config
from burnish.host_memory import free_memory_bytes
from burnish.plan import ModelShape, estimate_memory, explain_auto, fit_micro_tokens, resolve_auto
from burnish.plan.packing import surely_packed
from burnish.runtime import Ranks, smallest_over_ranks

GB = 10**9
LLAMA_8B = ModelShape.from_config_json({
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
})  # fmt: skip


def config(max_tokens: int = 2048, level: str = "auto", **sections: object) -> Config:
    model = {"path": "m", "activation_checkpointing": level}
    data = {"train": "d.jsonl", "max_tokens": max_tokens}
    return Config.model_validate(
        {"model": model, "data": data, "output_dir": "out", "adapter": {}} | sections
    )


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("memory_gb", [23, 24, 32, 40, 80, 180])
def test_what_is_chosen_fits_and_nothing_cheaper_would(device_type, memory_gb) -> None:
    asked = config()
    resolved = resolve_auto(asked, LLAMA_8B, 1, memory_gb * GB, device_type)
    tokens, level = resolved.batch.micro_tokens, resolved.model.activation_checkpointing
    assert isinstance(tokens, int)

    def needed(num_tokens: int, level: str) -> int:
        trial = config(level=level)
        return estimate_memory(trial, LLAMA_8B, 1, num_tokens, device_type=device_type).device.total

    usable = 0.92 * memory_gb * GB
    assert needed(tokens, level) <= usable
    if level != "none":
        faster = {"light": "none", "full": "light"}[level]
        assert needed(4096, faster) > usable
    most = {"cpu": 4096, "cuda": 65_536}[device_type]
    assert tokens == most or needed(2 * tokens, level) > usable


def test_short_memory_shortens_forwards_down_to_the_longest_example() -> None:
    without = config(max_tokens=512, level="none")
    sizes = [fit_micro_tokens(without, LLAMA_8B, 1, gb * GB) for gb in (18, 21, 25, 40, 80)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 512
    assert sizes[-1] >= 4096


def test_nothing_is_chosen_without_memory_to_choose_by() -> None:
    resolved = resolve_auto(config(), LLAMA_8B, 1, None)
    assert resolved.batch.micro_tokens == "auto"
    assert resolved.model.activation_checkpointing == "none"
    assert resolve_auto(config(level="light"), LLAMA_8B, 1, GB).model.activation_checkpointing == "light"


def test_choices_are_told_with_their_reason() -> None:
    asked = config()
    told = explain_auto(asked, resolve_auto(asked, LLAMA_8B, 1, 24 * GB), 24 * GB)
    assert [line.split(",")[0] for line in told] == [
        "model.activation_checkpointing: full",
        "batch.micro_tokens: 4096",
    ]
    assert all("24 GB a rank" in line for line in told)
    fixed = config(level="none", batch={"micro_tokens": 1000})
    assert explain_auto(fixed, resolve_auto(fixed, LLAMA_8B, 1, 24 * GB), 24 * GB) == ()


def test_free_memory_is_the_container_s_where_that_is_less(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    assert free_memory_bytes(tmp_path) is None
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    assert free_memory_bytes(tmp_path) == 5000 * 1024
    groups = tmp_path / "sys" / "fs" / "cgroup"
    groups.mkdir(parents=True)
    (groups / "memory.max").write_text("max\n")
    (groups / "memory.current").write_text("1024\n")
    assert free_memory_bytes(tmp_path) == 5000 * 1024
    (groups / "memory.max").write_text("4096\n")
    assert free_memory_bytes(tmp_path) == 3072


def test_one_process_has_its_own_least() -> None:
    assert smallest_over_ranks(3, Ranks(0, 0, 1)) == 3
    assert smallest_over_ranks(None, Ranks(0, 0, 1)) is None


# ------------------------------------------------------------------ packed, before the model is there

SURE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "cohere", "gpt_neox", "mixtral", "olmo2",
        "smollm3", "qwen3_moe")  # fmt: skip


@pytest.mark.parametrize("family", SURE)
def test_families_taken_for_sure_keep_documents_apart(family) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from burnish.model.attention import can_isolate

    theirs = AutoConfig.for_model(
        family, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    assert surely_packed(config(), theirs.to_dict()) is True
    assert can_isolate(AutoModelForCausalLM.from_config(theirs).float(), max_tokens=2048).packed


def test_others_are_left_to_a_trial_and_settings_decide_first() -> None:
    off = Config.model_validate(config().model_dump() | {"data": {"train": "d", "packing": "off"}})
    assert surely_packed(off, {"model_type": "llama"}) is False
    assert surely_packed(config(), {"model_type": "mamba"}) is None
    assert surely_packed(config(), {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}}) is None
    assert surely_packed(config(), {"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}) is True


def test_compiled_layers_are_never_light() -> None:
    """What `light` computes again, the compiler does with `none`."""
    asked = config(model={"path": "m", "activation_checkpointing": "auto", "compile": True})
    resolved = [resolve_auto(asked, LLAMA_8B, 1, size * GB) for size in range(20, 200, 10)]
    assert {r.model.activation_checkpointing for r in resolved} == {"none", "full"}
