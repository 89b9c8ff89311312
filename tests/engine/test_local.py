"""The local engine and the optimizer, piece by piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from burnish.config.schema import OptimConfig
from burnish.data.collate import collate
from burnish.engine import gradients
from burnish.engine.build import build_engine, engine_kind, parameter_dtype
from burnish.engine.ds_checkpoint import refuse_other_stage
from burnish.engine.local import LocalEngine
from burnish.engine.optimizer import build_param_groups
from burnish.engine.state_files import exported_weights, refuse_empty
from burnish.errors import CheckpointError, ConfigError
from burnish.records import MicroBatch
from burnish.runtime import Ranks
from rig.toy import toy_config, toy_llama, toy_model, toy_store

ALONE = Ranks(0, 0, 1)
CPU = torch.device("cpu")


def engine_for(settings: dict[str, object], tied: bool = False) -> LocalEngine:
    config = toy_config("out", settings)
    dtype = parameter_dtype(config, ALONE)
    return LocalEngine(
        toy_model(config, dtype, tied=tied),
        config.optim,
        ranks=ALONE,
        device=CPU,
        compute_dtype=torch.float32,
        adapter_only=config.adapter is not None,
    )


def batch_of(*example_ids: int) -> tuple[MicroBatch, float]:
    store = toy_store()
    weight = float(store.total_weight[list(example_ids)].sum())
    return collate([store[i] for i in example_ids], list(example_ids), True, 0), weight


def test_step_equals_plain_pytorch() -> None:
    """Clip, decay and update by hand, with torch's plain loop, on the loss the model itself gives."""
    batch, weight = batch_of(0, 1, 2)
    engine = engine_for({})
    reference = toy_llama()
    plain = dict(reference.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in plain.values() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in plain.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    store = toy_store()
    for lr in (0.01, 0.004):
        nll = engine.forward_backward(batch, weight)
        result = engine.step(lr)
        loss = torch.zeros(())
        for i in (0, 1, 2):
            example = store[i]
            tokens = torch.from_numpy(example.token_ids.astype(np.int64))[None]
            log_p = reference(tokens).logits[0, :-1].log_softmax(-1)
            chosen = log_p.gather(1, tokens[0, 1:, None])[:, 0]
            loss = loss - (chosen * torch.from_numpy(example.weights[1:].copy())).sum()
        (loss / weight).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert nll.item() == pytest.approx(loss.item(), rel=1e-5)
        assert result.applied
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    exported = engine.export_state()
    assert exported is not None
    for name, parameter in plain.items():
        torch.testing.assert_close(exported[name], parameter.detach(), rtol=1e-4, atol=2e-5)


def test_decay_groups() -> None:
    model = toy_llama()
    groups = build_param_groups(model, OptimConfig(weight_decay=0.3))
    by_decay = {group["weight_decay"]: group["params"] for group in groups}
    assert all(p.ndim >= 2 for p in by_decay[0.3])
    assert all(p.ndim == 1 for p in by_decay[0.0])
    assert len(by_decay[0.3]) + len(by_decay[0.0]) == len(list(model.parameters()))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable"):
        build_param_groups(model, OptimConfig())


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "rank": 2, "alpha": 4}])
def test_state_comes_back_to_the_bit(tmp_path: Path, adapter: dict[str, object] | None) -> None:
    batch, weight = batch_of(3, 4)
    engine = engine_for({"adapter": adapter})
    for _ in range(2):
        engine.forward_backward(batch, weight)
        engine.step(0.01)
    files = engine.save_state(tmp_path / "state")
    assert sorted(p.name for p in files) == ["optimizer.safetensors", "scaler.json", "weights.safetensors"]
    other = engine_for({"adapter": adapter})
    other.load_state(tmp_path / "state")
    for some in (engine, other):
        some.forward_backward(batch, weight)
        some.step(0.01)
    ours, theirs = engine.export_state(), other.export_state()
    assert ours is not None
    assert theirs is not None
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    engine_for({"adapter": {"kind": "lora", "rank": 2}}).save_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match="tensors differ"):
        engine_for({"adapter": {"kind": "lora", "rank": 4}}).load_state(tmp_path / "state")


def test_state_of_the_other_engine_is_refused_with_the_key_that_takes_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="kind: deepspeed"):
        engine_for({}).load_state(tmp_path)
    with pytest.raises(CheckpointError, match="kind: local"):
        refuse_other_stage(tmp_path, 2, 0)


def test_export_shares_tied_weights_and_leaves_out_frozen_ones() -> None:
    exported = engine_for({}, tied=True).export_state()
    assert exported is not None
    assert exported["lm_head.weight"] is exported["model.embed_tokens.weight"]
    adapter = engine_for({"adapter": {"kind": "lora", "rank": 2}}).export_state()
    assert adapter is not None
    assert all("lora_" in name for name in adapter)


@pytest.mark.parametrize("part", ["lora_A", "layers.0"])
def test_what_is_frozen_of_an_adapter_is_exported_too(part: str) -> None:
    """Trained B on a random A that nobody has would be noise to whoever loads it."""
    lora = {"adapter": {"kind": "lora", "rank": 2}}
    whole, some = engine_for(lora).export_state(), engine_for({**lora, "model.freeze": [part]}).export_state()
    assert whole is not None
    assert some is not None
    assert some.keys() == whole.keys()


def test_export_refuses_empty_tensors() -> None:
    with pytest.raises(CheckpointError, match=r"lora_A"):
        refuse_empty({"lora_A": torch.empty(0)})
    model = toy_llama().requires_grad_(False)
    with pytest.raises(CheckpointError, match="no weights"):
        exported_weights(model, adapter_only=True)


def test_buckets_hold_everything_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 40)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 4, 2, 30, 1)]
    buckets = list(gradients._buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[3, 4, 2], [30], [1]]


def test_large_gradients_are_summed_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[torch.Tensor] = []

    def as_if_two_ranks_had_the_same(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        summed.append(tensor)
        return tensor.mul_(2)

    monkeypatch.setattr(gradients, "sum_over_ranks", as_if_two_ranks_had_the_same)
    monkeypatch.setattr(gradients, "ALONE_BYTES", 80)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 20, 2, 30, 19)]
    parameters.append(nn.Parameter(torch.zeros(5, 8).T))  # large, and not one run of memory
    given = [torch.randn(p.shape) for p in parameters]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient.clone()
    parameters[3].grad = None  # this rank has none of it
    given[3].zero_()
    gradients.sum_gradients(parameters, Ranks(0, 0, 2))
    for parameter, gradient in zip(parameters, given, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, 2 * gradient)
    assert [tensor.numel() for tensor in summed] == [20, 30, 3 + 2 + 19 + 40]
    assert summed[0] is parameters[1].grad and summed[1] is parameters[3].grad


def test_auto_engine_and_dtypes() -> None:
    two = Ranks(0, 0, 2)
    auto = toy_config("out", {"model.dtype": "bf16"})
    assert engine_kind(auto, ALONE) == "local"
    assert engine_kind(auto, two) == "deepspeed"
    assert parameter_dtype(auto, ALONE) == torch.float32
    assert parameter_dtype(auto, two, stored=torch.bfloat16) == torch.bfloat16
    # What was stored with more bits than the forward runs in is loaded with all of them.
    for stored in (torch.float32, torch.float16, None):
        assert parameter_dtype(auto, two, stored=stored) == torch.float32
    nvme = {"engine.zero_stage": 3, "engine.offload_optimizer": "nvme"}
    swapped = toy_config("out", {"model.dtype": "bf16", **nvme})
    assert parameter_dtype(swapped, two) == torch.bfloat16
    lora = toy_config("out", {"model.dtype": "bf16", "adapter": {"kind": "lora", "rank": 2}})
    assert parameter_dtype(lora, ALONE) == torch.bfloat16


def test_offloading_on_one_process_means_deepspeed() -> None:
    """The local engine would leave it out without a word."""
    offloads = toy_config("out", {"engine.zero_stage": 3, "engine.offload_optimizer": "cpu"})
    assert engine_kind(offloads, ALONE) == "deepspeed"


def test_flex_attention_on_a_cpu_is_refused_before_its_backward_would_be() -> None:
    config = toy_config("out", {"model.attention": "flex"})
    with pytest.raises(ConfigError, match=r"model\.attention: is flex"):
        build_engine(config, Ranks(0, 0, 1), torch.device("cpu"), toy_model(config, torch.float32))
