"""Compiled layers: the same loss and gradients for every length, and no break where CUDA has one call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build

from burnish.errors import ConfigError, MachineError
from burnish.model import compiled
from burnish.model.attention import can_isolate
from burnish.model.compiled import compile_layers
from burnish.model.native import build as build_kernels

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {
    "family": "llama", "changes": {}, "wanted": False, "adapter": False, "level": "none", "bf16": False,
    "varlen": False, "device": "cpu",
    "backend": "inductor",
}  # fmt: skip
QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"wanted": True},
    "varlen": {"varlen": True},
    # Traced and differentiated as for kernels, but run as it is: seconds instead of a minute.
    "varlen-compiled": {"varlen": True, "wanted": True, "backend": "aot_eager"},
    "native": {"changes": {"head_dim": 16}, "bf16": True},
    "native-compiled": {"changes": {"head_dim": 16}, "bf16": True, "wanted": True, "backend": "aot_eager"},
    "latent": {"family": "deepseek_v3"},
    "latent-varlen": {"family": "deepseek_v3", "varlen": True},
    "window": {"family": "mistral"},
    "window-varlen": {"family": "mistral", "varlen": True},
}
WAYS: dict[str, dict[str, Any]] = {
    f"{level}-{'lora' if adapter else 'weights'}-{'bf16' if bf16 else 'fp32'}": {
        "family": "qwen3", "level": level, "adapter": adapter, "bf16": bf16
    }
    for level in ("none", "full")
    for adapter in (False, True)
    for bf16 in (False, True)
}  # fmt: skip
WAYS["varlen-fp32"] = {"varlen": True}
OTHERS = {family: {"family": family} for family in FAMILIES}


def run(cases: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """All cases in one process of their own."""
    (folder / "cases.json").write_text(json.dumps({name: {**PLAIN, **case} for name, case in cases.items()}))
    worker = Path(__file__).with_name("compiled_worker.py")
    tests = worker.parent.parent
    paths = [str(path) for path in (tests, tests / "model", tests.parent / "src")]
    paths += [told] if (told := os.environ.get("PYTHONPATH")) else []  # where packages may be
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, str(worker), str(folder / "cases.json"), str(folder / "results.pt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


def _worst(found: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    """The largest error of a gradient, as a share of its largest element."""
    return max(
        float((ours[name] - gradient).abs().max() / (gradient.abs().max() + 1e-6))
        for ours, theirs in zip(found["gradients"], exact["gradients"], strict=True)
        for name, gradient in theirs.items()
    )


def both(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Each case with its layers compiled and without."""
    return {**cases, **{f"{name} compiled": {**case, "wanted": True} for name, case in cases.items()}}


def same(found: Mapping[str, Any], expected: Mapping[str, Any], bound: float = 1e-5) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=bound)
    for ours, plain in zip(found["gradients"], expected["gradients"], strict=True):
        assert ours.keys() == plain.keys()
        for name, gradient in plain.items():
            worst = (ours[name] - gradient).abs().max()
            assert worst <= bound * gradient.abs().max() + 1e-6, name


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(QUICK, tmp_path_factory.mktemp("quick"))


def test_same_gradients(quick: dict[str, Any]) -> None:
    same(quick["compiled"], quick["plain"])
    counted = quick["compiled"]["counted"]
    assert counted["stats"]["unique_graphs"] > 0
    # Attention in fp32 on a CPU is a call of its own; nothing else breaks a layer.
    assert all("read from a tensor" in reason for reason in counted["graph_break"]), counted["graph_break"]


def test_a_gpus_way_gives_the_same(quick: dict[str, Any]) -> None:
    same(quick["varlen"], quick["plain"])
    same(quick["window-varlen"], quick["window"])
    same(quick["latent-varlen"], quick["latent"])  # its values are narrower than its queries


def test_a_gpus_way_is_compiled_without_a_break(quick: dict[str, Any]) -> None:
    same(quick["varlen-compiled"], quick["plain"])
    counted = quick["varlen-compiled"]["counted"]
    assert not counted.get("graph_break"), counted["graph_break"]
    # A layer, and the parts of the last one, whose norms are alike: no length costs another compilation.
    assert counted["stats"]["unique_graphs"] == 4


@pytest.mark.skipif(build_kernels.why_not() is not None, reason=f"no kernels: {build_kernels.why_not()}")
def test_our_kernel_does_not_break_a_layer(quick: dict[str, Any]) -> None:
    same(quick["native-compiled"], quick["native"])
    counted = quick["native-compiled"]["counted"]
    assert not counted.get("graph_break"), counted["graph_break"]
    assert counted["stats"]["unique_graphs"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("cases", [WAYS, OTHERS], ids=["ways", "families"])
def test_same_gradients_of_all(cases: Mapping[str, Mapping[str, Any]], tmp_path: Path) -> None:
    results = run(both(cases), tmp_path)
    for name in cases:
        if "bf16" not in name:
            same(results[f"{name} compiled"], results[name])
            continue
        # Fewer casts between kernels: what is compiled rounds otherwise, and not more.
        exact = results[name.replace("bf16", "fp32")]
        assert _worst(results[f"{name} compiled"], exact) <= 1.5 * _worst(results[name], exact), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_gradients_on_a_gpu(tmp_path: Path) -> None:
    cases = {
        "llama": {"device": "cuda", "bf16": True},
        "latent": {"device": "cuda", "bf16": True, "family": "deepseek_v3"},
    }
    results = run(both(cases), tmp_path)
    for name in cases:
        same(results[f"{name} compiled"], results[name], 3e-2)
    # The kernel is one operation to the compiler.
    assert not results["llama compiled"]["counted"].get("graph_break")


def test_the_last_layer_is_compiled_in_parts() -> None:
    """Its forward at supervised rows is another one in every micro-batch."""
    model = build("llama")
    capability = can_isolate(model)
    assert capability.whole_last_layer is None
    compile_layers(model, capability, CPU, wanted=True)
    first, last = model.model.layers
    assert first._compiled_call_impl is not None and last._compiled_call_impl is None
    assert all(part._compiled_call_impl is not None for part in last.children())


def test_names_of_weights_stay() -> None:
    model = build("llama")
    names = list(model.state_dict())
    compile_layers(model, can_isolate(model), CPU, wanted=True)
    assert list(model.state_dict()) == names


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.Linear(2, 2)
    monkeypatch.setattr(compiled, "causal_model", lambda model: model)
    monkeypatch.setattr(compiled, "body_of", lambda model: None)
    with pytest.raises(ConfigError, match="no layers"):
        compile_layers(plain, can_isolate(build("llama")), CPU, wanted=True)
    monkeypatch.setattr(compiled, "cxx_compiler", lambda: None)
    with pytest.raises(MachineError, match="compiler"):
        compile_layers(plain, can_isolate(build("llama")), CPU, wanted=True)
