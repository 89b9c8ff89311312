"""What has to hold before a speed counts: `python -m step.gates FOLDER DEVICE` prints it as JSON.

The judge is plain transformers in fp32, one document at a time, with its own attention and its own loss. It
sits on the device that is raced on: there are other kernels on a GPU than on a CPU.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from burnish.data.collate import collate
from burnish.records import NO_TARGET
from burnish.runtime import quieten_libraries
from step.cases import Race, read_race
from step.racers import labels_of, load_plain, own_engine
from step.turns import private_stdout

LIMITS = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest difference of the loss, and of any parameter's gradient (L2, relative), by dtype."""
FLOOR = 1e-3
"""A parameter whose gradient is under this share of the whole is held to this share's accuracy."""


def judge(race: Race, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of step 1 as each document alone gives them."""
    model: Any = load_plain(race).float().to(device).eval()
    stir(model)
    documents = race.documents(1)
    num_targets = sum(int(e.trained.sum()) for e in documents)
    total = 0.0
    for example in documents:
        ids = torch.from_numpy(example.token_ids.astype("int64"))[None].to(device)
        labels = torch.from_numpy(labels_of(example))[1:].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        nll = functional.cross_entropy(logits, labels, ignore_index=NO_TARGET, reduction="sum") / num_targets
        nll.backward()
        total += nll.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def stir(model: torch.nn.Module) -> None:
    """Give an adapter weights that every dtype holds. A fresh one changes nothing, and half of its
    gradients are 0; and where the base is bf16, its random numbers are rounded to that."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_((0.02 * torch.randn(parameter.shape, generator=generator)).bfloat16())


def ours(folder: Path, dtype: str, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of step 1 as the engine has them before it applies them."""
    race = read_race(folder, dtype)
    engine, feed = own_engine(race, device)
    stir(engine._model)
    window = race.windows.window(1)
    nll = 0.0
    for cut in window.cuts[0]:
        batch = collate([race.store[int(i)] for i in cut], cut, feed.packed, 0)
        nll += engine.forward_backward(batch, window.total_weight).item()
    model = engine._model.model
    return nll / window.total_weight, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def differences(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> tuple[str, float]:
    """The parameter whose gradients differ most, and by how much."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    whole = torch.stack([g.double().norm() for g in other.values()]).norm().item()
    gaps = {}
    for name, gradient in other.items():
        size = max(gradient.double().norm().item(), FLOOR * whole)
        gaps[name] = ((one[name].double() - gradient.double()).norm() / size).item()
    worst = max(gaps, key=lambda name: gaps[name])
    return worst, gaps[worst]


def contamination(folder: Path, device: torch.device) -> float:
    """How much the losses of other documents change when one is replaced: nothing should."""
    race = read_race(folder, "fp32")
    engine, _ = own_engine(race, device)
    cut = race.windows.window(1).cuts[0][0]
    documents = [race.store[int(i)] for i in cut]
    batch = collate(documents, cut, True, 0)
    before = engine.evaluate(batch)
    size = len(documents[0].token_ids)
    batch.token_ids[0, :size] = (batch.token_ids[0, :size] + 1) % race.shape.vocab_size
    after = engine.evaluate(batch)
    assert before[0] != after[0]
    return float((before[1:] - after[1:]).abs().max()) if len(cut) > 1 else 0.0


def coverage(race: Race) -> bool:
    """Whether an epoch's micro-batches hold every supervised token once."""
    seen: Counter[int] = Counter()
    num_targets = 0
    for step in range(1, race.windows.steps_per_epoch + 1):
        for cut in race.windows.window(step).cuts[0]:
            batch = collate([race.store[int(i)] for i in cut], cut, True, 0)
            seen.update(int(i) for i in batch.example_ids)
            num_targets += int((batch.targets != NO_TARGET).sum())
    once = all(seen[i] == 1 for i in range(len(race.store)))
    return once and num_targets == int(race.store.num_supervised.sum())


def main() -> None:
    """Run every gate on one case."""
    answers = private_stdout()
    quieten_libraries()
    folder, device = Path(sys.argv[1]), torch.device(sys.argv[2])
    race = read_race(folder)
    loss, gradients = judge(race, device)
    found: dict[str, Any] = {}
    passed = True
    for dtype, limit in LIMITS.items():
        own_loss, own_gradients = ours(folder, dtype, device)
        name, gap = differences(own_gradients, gradients)
        loss_gap = abs(own_loss - loss) / loss
        found[dtype] = {"loss": loss_gap, "gradient": gap, "worst": name, "limit": limit}
        passed &= loss_gap <= limit and gap <= limit
    leak = contamination(folder, device)
    covered = coverage(race)
    found |= {"contamination": leak, "every_target_once": covered, "loss": loss}
    found["passed"] = bool(passed and leak == 0.0 and covered)
    answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
