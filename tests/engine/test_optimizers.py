"""Optimizers beyond AdamW: against torch's own, over groups, and resumed to the bit."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from breadth.families import build
from burnish.config.schema import OptimConfig
from burnish.data.collate import collate
from burnish.engine.build import parameter_dtype
from burnish.engine.local import LocalEngine
from burnish.engine.muon import Shard, orthogonalized
from burnish.engine.optimizer import build_optimizer, build_param_groups
from burnish.errors import ConfigError, MachineError
from burnish.runtime import Ranks
from rig.toy import toy_config, toy_llama, toy_model, toy_store

ALONE = Ranks(0, 0, 1)
CPU = torch.device("cpu")
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
NAMES = ["adamw", "adamw_8bit", "muon", "adafactor"]
RATES = {"adamw": 1e-2, "adamw_8bit": 1e-2, "muon": 1e-2, "adafactor": 0.3}

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def engine_for(name: str, **settings: Any) -> LocalEngine:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = toy_config("out", {"optim.name": name, "optim.lr": RATES[name], **settings})
    engine = LocalEngine(
        toy_model(config, parameter_dtype(config, ALONE)),
        config.optim,
        ranks=ALONE,
        device=CPU,
        compute_dtype=torch.float32,
        adapter_only=config.adapter is not None,
    )
    if name == "adamw_8bit":  # it keeps 32 bits for small weights, and all of the toy's are
        engine._optimizer.args.min_8bit_size = 0  # pyright: ignore[reportAttributeAccessIssue]
    return engine


def run_steps(engine: LocalEngine, steps: range, rate: float) -> list[tuple[float, float | None]]:
    store = toy_store()
    seen = []
    for step in steps:
        ids = [step % 4, 4 + step % 3]
        weight = float(store.total_weight[ids].sum())
        loss = engine.forward_backward(collate([store[i] for i in ids], ids, True, 0), weight)
        seen.append((float(loss) / weight, engine.step(rate).grad_norm))
    return seen


def weights_of(engine: LocalEngine) -> dict[str, torch.Tensor]:
    state = engine.export_state()
    assert state is not None
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_and_resumes_to_the_bit(name: str, adapter: Any, tmp_path: Path) -> None:
    settings = {"adapter": adapter} if adapter else {}
    engine = engine_for(name, **settings)
    first = run_steps(engine, range(6), RATES[name])
    engine.save_state(tmp_path / "state")
    rest = run_steps(engine, range(6, 12), RATES[name])
    assert rest[-1][0] < first[0][0]
    other = engine_for(name, **settings)
    other.load_state(tmp_path / "state")
    assert run_steps(other, range(6, 12), RATES[name]) == rest
    for key, tensor in weights_of(engine).items():
        assert torch.equal(tensor, weights_of(other)[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_is_the_gradients_own_before_clipping(name: str) -> None:
    """Nothing that an optimizer does to gradients reaches the number that is reported."""
    (_, clipped), *_ = run_steps(engine_for(name, **{"optim.max_grad_norm": 1e-3}), range(1), 1e-9)
    (_, free), *_ = run_steps(engine_for("adamw", **{"optim.max_grad_norm": None}), range(1), 1e-9)
    assert clipped == free and free is not None and free > 0.1


# ------------------------------------------------------------------ muon


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 40)])
def test_orthogonalizing_is_torchs(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = gradient
    # No momentum, no decay, rate 1: what is left of the step is the orthogonalised gradient.
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    adjusted = max(1.0, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(
        orthogonalized(gradient).float() * -adjusted, weight.detach(), atol=5e-3, rtol=0
    )
    values = torch.linalg.svdvals(orthogonalized(gradient).float())
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_a_stack_of_matrices_is_each_alone() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 12)
    for matrix, ours in zip(stack, orthogonalized(stack), strict=True):
        torch.testing.assert_close(ours, orthogonalized(matrix), atol=1e-2, rtol=0)
    assert not orthogonalized(torch.zeros(4, 4)).any()  # LoRA's A has no gradient in the first step


def test_muon_steps_like_torchs_two_optimizers() -> None:
    config = OptimConfig(name="muon", lr=0.02, weight_decay=0.1)
    ours, theirs = toy_llama(), toy_llama()
    inside = {
        n for n, p in theirs.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    }
    named = dict(theirs.named_parameters())
    lists = [named["model.embed_tokens.weight"], named["lm_head.weight"]]
    vectors = [p for p in named.values() if p.ndim == 1]
    rates = {"lr": 0.02, "weight_decay": 0.1}
    references = [
        torch.optim.Muon([named[n] for n in inside], momentum=0.95, adjust_lr_fn="match_rms_adamw", **rates),
        torch.optim.AdamW(lists, betas=config.betas, **rates),
        torch.optim.AdamW(vectors, betas=config.betas, lr=0.02, weight_decay=0.0),
    ]
    optimizer = build_optimizer(ours, config)
    assert {g["orthogonal"] for g in optimizer.param_groups} == {True, False}
    for _ in range(3):
        for name, parameter in ours.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            named[name].grad = parameter.grad.clone()
        optimizer.step()
        for reference in references:
            reference.step()
    for name, parameter in ours.named_parameters():
        tolerance = 2e-3 if name in inside else 1e-7
        torch.testing.assert_close(parameter, named[name], atol=tolerance, rtol=0, msg=name)


def test_clipping_comes_before_newton_schulz() -> None:
    """A step's length does not shrink with the clipping: 28 times, where the clip looks at the update."""
    free = engine_for("muon", **{"optim.max_grad_norm": None, "optim.weight_decay": 0.0})
    clipped = engine_for("muon", **{"optim.max_grad_norm": 1e-3, "optim.weight_decay": 0.0})
    before = weights_of(free)
    run_steps(free, range(1), 1e-2)
    run_steps(clipped, range(1), 1e-2)
    for name, start in before.items():
        if "proj" in name:
            lengths = [float((weights_of(e)[name] - start).norm()) for e in (free, clipped)]
            assert lengths[1] == pytest.approx(lengths[0], rel=2e-2), name


def test_shards_put_a_matrix_together() -> None:
    matrix = torch.arange(12.0)
    flat = torch.cat([torch.zeros(5), matrix])
    assert torch.equal(Shard((3, 4), 0, 5, 12, shared=False).whole(flat), matrix.view(3, 4))
    assert Shard((3, 4), 0, 0, 0, shared=False).whole(flat) is None


# ------------------------------------------------------------------ groups


def test_rates_by_part() -> None:
    """LoRA+: B learns 16 times as fast; the last pattern that names a weight counts."""
    config = toy_config("out", {"adapter": LORA, "optim.group_lr": {"lora_*": 2.0, "lora_B": 16.0}})
    model = toy_model(config, torch.float32)
    groups = build_param_groups(model, config.optim)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        expected = 16.0 if "lora_B" in names[id(group["params"][0])] else 2.0
        assert group["lr_factor"] == expected
        assert all(("lora_B" in names[id(p)]) == (expected == 16.0) for p in group["params"])
    assert sum(len(g["params"]) for g in groups) == len([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("family", "changes", "exempt"),
    [
        ("gpt_oss", {}, ("experts.gate_up_proj_bias", "experts.down_proj_bias")),
        ("cohere", {"use_qk_norm": True}, ("q_norm.weight", "k_norm.weight")),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_norms_and_biases_of_two_dimensions_are_exempt_too(
    name: str, family: str, changes: dict[str, Any], exempt: tuple[str, ...]
) -> None:
    """A table of the experts' biases or of the heads' scales is no matrix to decay or to orthogonalize."""
    model = build(family, **changes)
    named = {id(p): (n, p) for n, p in model.named_parameters()}
    found = set()
    for group in build_param_groups(model, OptimConfig(name=name, weight_decay=0.5)):
        for path, parameter in (named[id(p)] for p in group["params"]):
            spared = parameter.dim() == 1 or path.endswith(exempt)
            found |= {end for end in exempt if path.endswith(end) and parameter.dim() == 2}
            assert (group["weight_decay"] == 0.0) == spared, path
            assert not (spared and group["orthogonal"]), path
    assert found == set(exempt)


@pytest.mark.parametrize("later", [(2.0, 0.5), (0.5, 0.5), (1.0, 1.0)])
def test_other_factors_leave_the_groups_as_they_are(later: tuple[float, float]) -> None:
    """A run may be resumed with other factors, and ZeRO's state stands in the order of the groups: two of one
    size that changed places would take over each other's weights."""

    def order(factors: tuple[float, float]) -> list[list[str]]:
        model = toy_llama()
        names = {id(p): name for name, p in model.named_parameters()}
        parts = dict(zip(("embed_tokens", "lm_head"), factors, strict=True))
        groups = build_param_groups(model, OptimConfig(group_lr=parts))
        return [[names[id(p)] for p in group["params"]] for group in groups]

    assert order(later) == order((0.5, 2.0))


def test_a_part_with_its_own_rate_moves_by_it() -> None:
    """Adam's first step is the rate times the gradient's sign."""
    engine = engine_for("adamw", **{"optim.group_lr": {"embed_tokens": 0.25}, "optim.weight_decay": 0.0})
    before = weights_of(engine)
    run_steps(engine, range(1), 1e-2)
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in weights_of(engine).items()}
    assert moved["model.embed_tokens.weight"] == pytest.approx(0.25e-2, rel=1e-3)
    assert moved["lm_head.weight"] == pytest.approx(1e-2, rel=1e-3)


def test_a_part_that_is_not_there_or_not_trained() -> None:
    with pytest.raises(ConfigError, match="nothing trained is called 'lora_B'"):
        build_param_groups(toy_llama(), OptimConfig(group_lr={"lora_B": 16.0}))
    frozen = copy.deepcopy(toy_llama())
    frozen.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ConfigError, match="embed_tokens"):
        build_param_groups(frozen, OptimConfig(group_lr={"embed_tokens": 0.1}))


def test_8bit_without_bitsandbytes_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install .burnish\[bitsandbytes\]"):
        build_optimizer(toy_llama(), OptimConfig(name="adamw_8bit"))


@needs_bitsandbytes
def test_8bit_state_is_a_quarter() -> None:
    weight = nn.Parameter(torch.zeros(128, 64))
    optimizer = build_optimizer(nn.ParameterList([weight]), OptimConfig(name="adamw_8bit"))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    num_bytes = sum(t.numel() * t.element_size() for k, t in optimizer.state[weight].items() if "state" in k)
    assert num_bytes == 2 * weight.numel()
