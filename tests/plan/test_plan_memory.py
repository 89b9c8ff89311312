"""Memory as planned: against what was measured, against published numbers, and what to change to fit."""

import importlib.util
import sys
from pathlib import Path

import pytest

from burnish.config.schema import Config
from burnish.plan import Device, ModelShape, WindowCounts, estimate_memory, make_plan
from burnish.plan.activations import Forward, layer_bytes_per_token, light_bytes_per_token

GB = 10**9
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672,
}  # fmt: skip


def config(**sections) -> Config:
    base = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "out"}
    return Config.model_validate(base | {name: base.get(name, {}) | keys for name, keys in sections.items()})


def counts(max_micro_tokens: int = 4096) -> WindowCounts:
    return WindowCounts(
        num_steps=100, num_examples=12_800, num_tokens=12_000_000, num_supervised_tokens=6_000_000,
        num_examples_per_epoch=12_800, steps_per_epoch=100, micro_batches_total=400, micro_batches_min=4,
        micro_batches_max=4, least_micro_batches_share=1.0, max_window_tokens=125_000,
        max_example_tokens=4096, max_micro_tokens=max_micro_tokens, sum_squared_tokens=2.4e10,
        imbalance_mean=0.002, imbalance_max=0.01, imbalance_windows=100, examples_per_source={"d": 12_800},
        packed=True, world_size=8,
    )  # fmt: skip


def test_a_layer_keeps_what_was_measured() -> None:
    """Llama, width 512, half as many key heads, MLP of 2.69 widths, bf16 under autocast on a CPU: 60.9 bytes
    a channel and layer were measured without recomputation, 27.0 with `light` (the input's 4 among them)."""
    keys = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
    shape = ModelShape.from_config_json(
        LLAMA_8B | keys | {"intermediate_size": int(2.69 * 512), "vocab_size": 32_000}
    )
    forward = Forward(element=2, stream=4, autocast=True, adapter=None, on_cpu=True)
    assert sum(layer_bytes_per_token(forward, shape)) / 512 == pytest.approx(60.9, rel=0.02)
    assert 4 + light_bytes_per_token(forward, shape) / 512 == pytest.approx(27.0, rel=0.02)


@pytest.mark.parametrize(
    ("sections", "published_gib"),
    [
        ({"adapter": {"rank": 8}, "model": {"path": "m", "activation_checkpointing": "full"}}, 16.2),
        (
            {
                "adapter": {"rank": 8, "quantize": "nf4"},
                "model": {"path": "m", "activation_checkpointing": "full"},
            },
            7.4,
        ),
    ],
)
def test_plans_are_near_published_peaks(sections, published_gib) -> None:
    """torchtune's README: Llama 3.1 8B on an RTX 4090, 2 x 2,048 tokens, LoRA and QLoRA."""
    shape = ModelShape.from_config_json(LLAMA_8B)
    planned = estimate_memory(config(**sections), shape, 1, 4096).device.total / 2**30
    assert planned == pytest.approx(published_gib, rel=0.2)


@pytest.mark.parametrize(
    ("model", "num_gpus", "memory_gb", "lines"),
    [
        (LLAMA_8B, 1, 24, ["model.activation_checkpointing: full", "engine.offload_optimizer: cpu"]),
        (LLAMA_8B, 1, 80, ["engine.offload_optimizer: cpu"]),
        (LLAMA_8B, 8, 80, []),
        (LLAMA_70B, 8, 80, ["model.activation_checkpointing: full", "engine.zero_stage: 3",
                            "engine.offload_optimizer: cpu"]),
        (LLAMA_70B, 64, 80, ["model.activation_checkpointing: full", "engine.zero_stage: 3"]),
    ],
)  # fmt: skip
def test_what_to_change_is_what_an_expert_would(model, num_gpus, memory_gb, lines) -> None:
    shape, device = ModelShape.from_config_json(model), Device("some", memory_gb * GB, 989e12)
    plan = make_plan(config(), counts(), shape, num_gpus, device)
    assert list(plan.suggestions) == lines
    assert plan.fits == (not lines)


def test_less_is_recomputed_where_less_is_enough() -> None:
    shape, device = ModelShape.from_config_json(LLAMA_8B), Device("some", 60 * GB, 989e12)
    plan = make_plan(config(), counts(), shape, 8, device)
    assert plan.suggestions == ("model.activation_checkpointing: light",)


def test_gradients_take_the_place_of_activations_in_a_step_of_one_micro_batch() -> None:
    shape = ModelShape.from_config_json(LLAMA_8B)
    several, one = (estimate_memory(config(), shape, 1, 4096, 0.5, many).device for many in (True, False))
    assert several.gradients == 4 * shape.num_params
    assert one.total < several.total
    assert one.total - one.weights - one.optimizer >= 4 * shape.num_params


def test_a_process_on_a_cpu_keeps_freed_memory_where_there_is_room() -> None:
    shape = ModelShape.from_config_json(LLAMA_8B)
    on_gpu = make_plan(config(), counts(), shape, 1).memory.device
    assert on_gpu.process == on_gpu.kept == 0

    def parts(memory_bytes):
        return make_plan(
            config(), counts(), shape, 1, device_type="cpu", memory_bytes=memory_bytes
        ).memory.device

    roomy = parts(None)
    assert roomy.kept == roomy.tensors // 2 and roomy.process > 0
    assert roomy.total == roomy.tensors + roomy.kept + roomy.process
    assert parts(roomy.tensors * 2) == roomy
    tight = parts(roomy.tensors * 3 // 2)  # not all of it may be used
    assert tight.kept == 0 and tight.tensors == roomy.tensors


def test_time_counts_the_forward_that_is_computed_again() -> None:
    shape, device = ModelShape.from_config_json(LLAMA_8B), Device("some", 80 * GB, 989e12)
    plain, again = (
        make_plan(config(model={"path": "m", "activation_checkpointing": level}), counts(), shape, 8, device)
        for level in ("none", "full")
    )
    assert again.flops == plain.flops  # useful ones
    assert plain.seconds is not None
    assert again.seconds is not None
    assert again.seconds / plain.seconds == pytest.approx(4 / 3, rel=0.05)


# ------------------------------------------------------------------ measured (bench/memory.py)


def bench():
    """bench/memory.py, which is no part of the package."""
    file = Path(__file__).parents[2] / "bench" / "memory.py"
    spec = importlib.util.spec_from_file_location("bench_memory", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_memory"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["fp32 full", "bf16 LoRA", "zero-2 bf16"])
def test_a_run_takes_the_memory_that_was_planned(name, tmp_path) -> None:
    measuring = bench()
    case = next(case for case in measuring.CASES if case.name == name)
    outcome = measuring.measure(case, tmp_path)
    assert abs(outcome.error) < 0.15, measuring.table([outcome])
