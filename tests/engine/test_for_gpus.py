"""What matters on GPUs only, as far as it can be seen without one: tensors on `meta` stand for theirs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from burnish.engine.ds_workarounds import announce_ranks, groups_kept_apart
from burnish.engine.state_files import restore_optimizer_state
from burnish.runtime import Ranks, _let_segments_grow, seeded

ELSEWHERE = torch.device("meta")


@pytest.mark.parametrize(("device", "said"), [("cpu", "3"), ("cuda:0", "0"), ("cuda:3", "3")])
def test_deepspeed_is_told_the_gpu_that_a_rank_sees(
    device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's `--gpus-per-task` shows every process one GPU, whatever its local rank."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    announce_ranks(Ranks(3, 3, 4), torch.device(device))
    assert os.environ["LOCAL_RANK"] == said


def test_a_loaded_step_counter_is_beside_its_parameter() -> None:
    parameters = [nn.Parameter(torch.zeros(2, device=ELSEWHERE)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters])
    shared = torch.tensor(4.0)
    with groups_kept_apart(optimizer):
        for parameter in parameters:
            optimizer.state[parameter]["step"] = shared  # as DeepSpeed gives it back: one, on the CPU
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert all(step.device == ELSEWHERE for step in steps)
    assert steps[0] is not steps[1]


@pytest.mark.parametrize("fused", [True, False])
def test_restored_state_is_where_the_optimizer_has_it(fused: bool) -> None:
    """A kernel wants the counter beside its parameter; a loop that reads it would make the host wait."""
    model = nn.Linear(2, 2, bias=False, device=ELSEWHERE)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["fused"] = fused
    flat = {"weight/step": torch.tensor(3.0), "weight/exp_avg": torch.zeros(2, 2)}
    restore_optimizer_state(model, optimizer, flat)
    state = optimizer.state[model.weight]
    assert state["exp_avg"].device == ELSEWHERE
    assert state["step"].device == (ELSEWHERE if fused else torch.device("cpu"))


def test_random_numbers_go_on_as_if_there_had_been_no_seed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        inside = torch.rand(3)
    with seeded(1):
        assert torch.equal(torch.rand(3), inside)
    assert torch.equal(torch.rand(3), expected)


def test_those_of_the_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds it along: dropout would draw the same again after every export."""
    kept: list[Sequence[int]] = []

    @contextlib.contextmanager
    def fork_rng(devices: Sequence[int]) -> Iterator[None]:
        kept.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    with seeded(1):
        pass
    assert kept == [[2]]


def test_the_allocator_is_not_told_over_its_users_head() -> None:
    found: dict[str, Any] = {}
    _let_segments_grow(found)
    assert found == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        own = {name: "max_split_size_mb:64"}
        _let_segments_grow(own)
        assert own == {name: "max_split_size_mb:64"}
