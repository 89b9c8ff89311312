"""The plan's arithmetic: schedule, parameter counts against transformers, memory, suggestions, text."""

import itertools
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.config.check import contradictions
from burnish.config.schema import AdapterConfig, Config, OptimConfig, ScheduleConfig
from burnish.errors import ConfigError
from burnish.plan import (
    Device,
    ModelShape,
    WindowCounts,
    bytes_text,
    estimate_memory,
    find_device,
    fit_micro_tokens,
    learning_rate,
    make_plan,
    num_warmup_steps,
    seconds_text,
    train_flops,
)
from burnish.plan.shapes import FAMILIES

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
GB = 10**9
H100 = Device("H100", 80 * GB, 989e12)


def config(**sections) -> Config:
    base = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "out"}
    return Config.model_validate({k: base.get(k, {}) | v for k, v in sections.items()} | {
        k: v for k, v in base.items() if k not in sections
    })  # fmt: skip


def window_counts(**changes) -> WindowCounts:
    values = {
        "num_steps": 100, "num_examples": 12_800, "num_tokens": 2_000_000, "num_supervised_tokens": 1_000_000,
        "num_examples_per_epoch": 12_800, "steps_per_epoch": 100, "micro_batches_total": 100,
        "micro_batches_min": 1, "micro_batches_max": 1, "least_micro_batches_share": 1.0,
        "max_window_tokens": 25_000, "max_example_tokens": 2_000, "max_micro_tokens": 4096,
        "sum_squared_tokens": 4e8, "imbalance_mean": 0.002, "imbalance_max": 0.01, "imbalance_windows": 100,
        "examples_per_source": {"d": 12_800}, "packed": True, "world_size": 8,
    }  # fmt: skip
    return WindowCounts(**(values | changes))


# ------------------------------------------------------------------ schedule

RATE = OptimConfig(lr=1e-3)


def rates(num_steps: int, **schedule) -> list[float]:
    shape = ScheduleConfig(**schedule)
    return [learning_rate(step, num_steps, RATE, shape) for step in range(1, num_steps + 1)]


def test_schedules_by_hand() -> None:
    line = {"warmup_ratio": 0.4, "min_lr_ratio": 0.0}
    assert rates(5, name="linear", **line) == pytest.approx([5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3, 0])
    assert rates(5, name="cosine", **line) == pytest.approx([5e-4, 1e-3, 7.5e-4, 2.5e-4, 0])
    assert rates(5, name="constant", **line) == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3])
    assert rates(3, name="linear", warmup_ratio=0.0, min_lr_ratio=0.5) == pytest.approx([1e-3, 7.5e-4, 5e-4])
    assert rates(1, name="cosine") == [1e-3]
    stable = {"name": "wsd", "warmup_ratio": 0.2, "min_lr_ratio": 0.1, "decay_ratio": 0.4}
    assert rates(5, **stable) == pytest.approx([1e-3, 1e-3, 1e-3, 5.5e-4, 1e-4])
    assert rates(5, **stable | {"warmup_ratio": 0.8}) == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-4])
    assert rates(3, name="wsd", decay_ratio=0.0) == [1e-3] * 3


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 300),
    st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_schedules_rise_then_fall_between_their_bounds(num_steps, name, warmup_ratio, min_lr_ratio) -> None:
    curve = rates(num_steps, name=name, warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio)
    peak = max(1, num_warmup_steps(num_steps, ScheduleConfig(warmup_ratio=warmup_ratio)))
    assert curve[peak - 1] == 1e-3 == max(curve)
    assert all(a < b for a, b in itertools.pairwise(curve[:peak]))
    assert all(a >= b for a, b in itertools.pairwise(curve[peak - 1 :]))
    assert min(curve[peak - 1 :]) >= 1e-3 * min_lr_ratio * (1 - 1e-9)
    if num_steps > peak and name != "constant":
        assert curve[-1] == pytest.approx(1e-3 * min_lr_ratio)


def test_warmup_is_rounded_up_and_not_fooled_by_floats() -> None:
    assert num_warmup_steps(100, ScheduleConfig(warmup_ratio=0.07)) == 7
    assert num_warmup_steps(10, ScheduleConfig(warmup_ratio=0.03)) == 1
    assert num_warmup_steps(10, ScheduleConfig(warmup_ratio=0.0)) == 0


@pytest.mark.parametrize("step", [0, 11])
def test_no_rate_outside_the_run(step) -> None:
    with pytest.raises(ValueError, match="not between 1 and 10"):
        learning_rate(step, 10, RATE, ScheduleConfig())


# ------------------------------------------------------------------ shapes

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "extra", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_parameter_counts_are_those_of_transformers(family, extra) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoConfig.for_model(family, **SMALL, **extra)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    shape = ModelShape.from_config_json(theirs.to_dict())
    assert shape.num_params == sum(p.numel() for p in model.parameters())
    assert shape.exact


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "lora") for family in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "starcoder2")),
        *((family, "lora") for family in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_neox")),
        ("llama", "dora"),
        ("qwen2", "dora"),
    ],
)
def test_adapter_counts_are_those_of_peft(family, kind) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoConfig.for_model(family, **SMALL)
    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", use_dora=kind == "dora"))
    ours = ModelShape.from_config_json(theirs.to_dict()).lora_params(AdapterConfig(kind=kind, rank=8))
    assert ours == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapter_targets_by_name() -> None:
    shape = ModelShape.from_config_json(LLAMA_8B)
    two = shape.lora_params(AdapterConfig(rank=16, targets=("q_proj", "v_proj")))
    assert two == 32 * 16 * ((4096 + 4096) + (4096 + 1024))


@pytest.mark.parametrize(
    ("sections", "exact"),
    [
        ({}, True),
        ({"adapter": {"targets": ["q_proj", "down_proj"]}}, True),
        ({"adapter": {"targets": ["q_proj", "embed_tokens"]}}, False),
        ({"adapter": {}, "model": {"path": "m", "freeze": ["lora_A"]}}, False),
        ({"model": {"path": "m", "freeze": ["embed_tokens"]}}, True),
        ({"model": {"path": "m", "freeze": ["wte"]}}, False),
    ],
)
def test_what_is_trained_is_exact_only_where_every_name_is_known(sections, exact) -> None:
    shape = ModelShape.from_config_json(LLAMA_8B)
    assert make_plan(config(**sections), window_counts(), shape, 1).exact_params is exact


def test_known_models() -> None:
    assert ModelShape.from_config_json(LLAMA_8B).num_params == 8_030_261_248
    qwen = {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
        "tie_word_embeddings": True,
    }  # fmt: skip
    assert ModelShape.from_config_json(qwen).num_params == 494_032_768


def test_an_unknown_family_is_estimated_and_a_broken_config_is_an_error() -> None:
    shape = ModelShape.from_config_json(LLAMA_8B | {"model_type": "new_thing"})
    assert not shape.exact
    assert shape.num_params == 8_030_261_248
    with pytest.raises(ConfigError, match=r"no hidden_size"):
        ModelShape.from_config_json({"model_type": "llama"})


LOCAL = [[["global", "local"], 1]]


@pytest.mark.parametrize(
    ("family", "sizes", "layers", "query"),
    [
        ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4}, 3, 64),
        ("mpt", {"d_model": 64, "n_layers": 3, "n_heads": 4}, 3, 64),
        ("gpt_neo", {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": LOCAL}, 2, 64),
        ("nemotron_h", {"hidden_size": 64, "layers_block_type": ["mlp", "full_attention"]}, 2, 32 * 128),
        ("mamba", {"hidden_size": 64, "num_hidden_layers": 2}, 2, 0),
        ("mamba2", {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16}, 2, 0),
    ],
)
def test_sizes_under_a_familys_own_names(family, sizes, layers, query) -> None:
    from transformers import AutoConfig

    shape = ModelShape.from_config_json(AutoConfig.for_model(family, **sizes).to_dict())
    assert (shape.hidden_size, shape.num_layers, shape.query_size) == (64, layers, query)
    assert not shape.exact
    if query == 0:  # no attention
        assert shape.cost_model().per_token_squared == 0


def test_widths_that_differ_by_layer() -> None:
    """Gemma 3n's config.json has a list of them."""
    shape = ModelShape.from_config_json(LLAMA_8B | {"intermediate_size": [14336] * 31 + [28672]})
    assert shape.num_params == 8_030_261_248 + 3 * 14336 * 4096
    # Doge's has a number of experts whether it has experts or not.
    dense = ModelShape.from_config_json(LLAMA_8B | {"num_experts": 64, "is_moe": False})
    assert dense.num_params == 8_030_261_248


# ------------------------------------------------------------------ memory, time, suggestions


def test_states_are_sharded_as_zero_says() -> None:
    """8B in bf16 on 8 ranks: 18 bytes a parameter in all (gradients add up in fp32), ever less on one."""
    shape = ModelShape.from_config_json(LLAMA_8B)
    num = shape.num_params
    states = {}
    for stage in range(4):
        parts = estimate_memory(config(engine={"zero_stage": stage}), shape, 8, 4096).device
        states[stage] = (parts.weights, parts.gradients, parts.optimizer)
    assert states[0] == (4 * num, 4 * num, 8 * num)  # fp32 masters, cast in the forward
    assert states[1] == (2 * num, 4 * num, 12 * num // 8)
    assert states[2] == (2 * num, 4 * num // 8, 12 * num // 8)
    assert states[3] == (2 * num // 8, 4 * num // 8, 12 * num // 8)


def test_what_saves_memory_saves_it_where_it_should() -> None:
    shape = ModelShape.from_config_json(LLAMA_8B)
    plain = estimate_memory(config(), shape, 8, 4096)
    offloaded = estimate_memory(config(engine={"offload_optimizer": "cpu"}), shape, 8, 4096)
    assert offloaded.device.optimizer == 0
    # Masters and moments, and each gradient in fp32 and as it came.
    assert offloaded.host_bytes == plain.device.optimizer + 6 * shape.num_params // 8
    full = estimate_memory(config(model={"path": "m", "activation_checkpointing": "full"}), shape, 8, 4096)
    assert full.device.activations < plain.device.activations / 8
    lora = estimate_memory(config(adapter={}), shape, 1, 4096).device
    qlora = estimate_memory(config(adapter={"quantize": "nf4"}), shape, 1, 4096).device
    assert qlora.weights < lora.weights / 2
    assert lora.optimizer < plain.device.optimizer
    assert lora.total == sum(v for k, v in lora.to_dict().items() if k != "total")


def test_flops_are_six_a_weight_and_token() -> None:
    shape = ModelShape.from_config_json(LLAMA_8B)
    counts = window_counts(num_supervised_tokens=2_000_000, sum_squared_tokens=0.0)
    weights = shape.active_layer_weights + shape.embedding_params
    assert train_flops(config(), counts, shape) == pytest.approx(6 * weights * 2_000_000)


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("memory_gb", [24, 40, 80])
@pytest.mark.parametrize("adapter", [None, {}, {"quantize": "nf4"}])
def test_suggestions_make_it_fit(world_size, memory_gb, adapter) -> None:
    device = Device("some", memory_gb * GB, 1e14)
    shape = ModelShape.from_config_json(LLAMA_8B)
    before = config(adapter=adapter) if adapter is not None else config()
    plan = make_plan(before, window_counts(), shape, world_size, device)
    if plan.fits:
        assert plan.suggestions == ()
        return
    assert plan.suggestions
    raw = before.model_dump()
    for line in plan.suggestions:
        key, value = line.split(": ")
        section, name = key.split(".")
        raw[section] = (raw[section] or {}) | {name: int(value) if value.isdigit() else value}
    after = Config.model_validate(raw)
    assert not (after.adapter and after.adapter.quantize and after.engine.zero_stage == 3)
    tokens = after.batch.micro_tokens
    counts = window_counts() if tokens == "auto" else window_counts(max_micro_tokens=tokens)
    assert make_plan(after, counts, shape, world_size, device).fits


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"path": "m", "compile": True}},
        {"model": {"path": "m", "pad_vocab_multiple": 64}},
        {"model": {"path": "m", "init": "random"}},
        {"optim": {"name": "muon"}},
        {"engine": {"zero_stage": 0}},
        {"optim": {"name": "adafactor"}, "engine": {"zero_stage": 0}},
    ],
)
@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("memory_gb", [8, 16, 24, 40, 60, 80, 120])
def test_what_is_suggested_is_what_train_takes(sections, world_size, memory_gb) -> None:
    device, shape = Device("some", memory_gb * GB, 1e14), ModelShape.from_config_json(LLAMA_8B)
    before = config(**sections, launch={"num_processes": world_size})
    raw = before.model_dump()
    for line in make_plan(before, window_counts(), shape, world_size, device).suggestions:
        key, value = line.split(": ")
        section, name = key.split(".")
        raw[section] = (raw[section] or {}) | {name: int(value) if value.isdigit() else value}
    assert list(contradictions(Config.model_validate(raw))) == []


def test_nothing_helps_a_model_that_is_far_too_large() -> None:
    plan = make_plan(
        config(), window_counts(), ModelShape.from_config_json(LLAMA_8B), 1, Device("tiny", GB, 1e12)
    )
    assert plan.fits is False
    assert plan.suggestions == ()
    assert "no setting is enough" in plan.describe()


def test_micro_tokens_follow_the_memory() -> None:
    shape = ModelShape.from_config_json(LLAMA_8B)
    small, large = (fit_micro_tokens(config(adapter={}), shape, 8, gb * GB) for gb in (24, 80))
    assert 4096 <= small <= large
    assert fit_micro_tokens(config(data={"train": "d", "max_tokens": 10_000}), shape, 1, GB) == 10_000


def test_the_plan_is_json_and_says_what_it_must() -> None:
    setup = config(checkpoint={"every_steps": 30}, eval={"every_steps": 40}, data={"train": "d", "eval": "e"})
    plan = make_plan(setup, window_counts(), ModelShape.from_config_json(LLAMA_8B), 8, H100)
    told = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert told["num_steps"] == 100
    assert told["num_examples"] == 12_800
    assert told["num_tokens"] == 2_000_000
    assert told["num_supervised_tokens"] == 1_000_000
    assert told["micro_batches_per_step"] == 1
    assert told["num_warmup_steps"] == 3
    assert told["checkpoint_steps"] == [30, 60, 90]
    assert told["eval_steps"] == [0, 40, 80, 100]
    assert set(told["memory_bytes"]) == {
        "weights", "gradients", "optimizer", "activations", "head", "buffers", "process", "kept", "total",
    }  # fmt: skip
    text = plan.describe()
    for part in ("12,800 examples", "100 (100 an epoch)", "3 warm-up", "8,030,261,248", "H100", "of peak"):
        assert part in text
    assert all(len(line) < 200 for line in text.splitlines())


def test_devices_are_found_by_what_torch_calls_them() -> None:
    for name, ours in [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
    ]:
        found = find_device(name)
        assert found is not None
        assert found.name.startswith(ours)
    assert find_device("Apple M9") is None
    assert find_device("NVIDIA L40") is None


def test_sizes_and_times_read_well() -> None:
    assert [bytes_text(n) for n in (0, 999, 1500, 80 * GB, 1.25e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "80 GB",
        "1.25 TB",
    ]
    assert [seconds_text(s) for s in (12, 90, 7500, 300_000)] == ["12 s", "2 min", "2 h 5 min", "3 d 11 h"]


def test_planning_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'deepspeed'}"
    code = f"import sys, burnish.plan; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
