"""Whether training goes the same way: `python -m step.curve FOLDER DEVICE` prints it as JSON.

The judge is that of `step.gates`, trained: plain transformers in fp32, one document at a time, with its own
attention and its own loss. Against it our step in bf16, from the same weights, over every window of the case.
And, to tell what bf16 does from what we do, plain transformers in bf16 over packed documents.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from burnish.plan.schedule import learning_rate
from burnish.records import NO_TARGET, Example
from burnish.runtime import quieten_libraries
from step.cases import Race, read_race
from step.racers import ALONE, Forward, hf_packed_nll, labels_of, load_plain, own_engine
from step.turns import private_stdout

LIMIT = 5e-3
"""Largest relative difference of any step's loss, and of the mean of the last ones."""
NUM_LAST = 10


def learning_rates(race: Race) -> Iterator[tuple[int, float]]:
    """Every step of the case and its learning rate."""
    num_steps = race.windows.num_steps
    for step in range(1, num_steps + 1):
        yield step, learning_rate(step, num_steps, race.config.optim, race.config.schedule)


def alone(model: Any, documents: Sequence[Example], device: torch.device) -> torch.Tensor:
    """Sum of the negative log-likelihoods of one document's targets, with no mask and no padding."""
    (example,) = documents
    ids = torch.from_numpy(example.token_ids.astype("int64"))[None].to(device)
    labels = torch.from_numpy(labels_of(example))[1:].to(device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits, labels, ignore_index=NO_TARGET, reduction="sum")


def plain_curve(
    race: Race, device: torch.device, forward: Forward, documents_at_once: int, bf16: bool
) -> list[float]:
    """Loss of each step as plain transformers has it, its weights in fp32."""
    model: Any = load_plain(race).float().to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optim = race.config.optim
    optimizer = torch.optim.AdamW(
        trained, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    assert optim.max_grad_norm is not None
    losses = []
    for step, lr in learning_rates(race):
        documents = race.documents(step)
        num_targets = sum(int(e.trained.sum()) for e in documents)
        loss = 0.0
        for begin in range(0, len(documents), documents_at_once):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                nll = forward(model, documents[begin : begin + documents_at_once], device)
            (nll / num_targets).backward()
            loss += nll.item() / num_targets
        torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
    return losses


def own_curve(race: Race, device: torch.device) -> list[float]:
    """Loss of each step as `train_step` has it."""
    from burnish.train.step import train_step

    engine, feed = own_engine(race, device)
    return [
        train_step(engine, race.windows.window(step), feed, ALONE, lr)[0].loss
        for step, lr in learning_rates(race)
    ]


def compared(own: Sequence[float], judged: Sequence[float]) -> dict[str, Any]:
    """How far a curve is from the judge's, relative to that."""
    assert len(own) == len(judged) >= NUM_LAST
    gaps = [abs(mine - right) / right for mine, right in zip(own, judged, strict=True)]
    last_own, last_judged = sum(own[-NUM_LAST:]), sum(judged[-NUM_LAST:])
    last_gap = abs(last_own - last_judged) / last_judged
    largest = max(gaps)
    return {
        "largest_gap": largest,
        "largest_gap_at_step": gaps.index(largest) + 1,
        "last_gap": last_gap,
        "passed": all(gap <= LIMIT for gap in [*gaps, last_gap]),  # not passed where one is NaN
    }


def main() -> None:
    """Train both on one case."""
    answers = private_stdout()
    quieten_libraries()
    folder, device = Path(sys.argv[1]), torch.device(sys.argv[2])
    race = read_race(folder)
    own = own_curve(race, device)
    judged = plain_curve(race, device, alone, 1, bf16=False)
    plain = plain_curve(race, device, hf_packed_nll, race.case.examples_per_step, bf16=True)
    found = {
        "steps": len(own),
        "last_steps": NUM_LAST,
        "limit": LIMIT,
        **compared(own, judged),
        "plain_bf16": compared(plain, judged),
        "own_to_plain_bf16": compared(own, plain),
        "losses": {"own": own, "judged": judged, "plain_bf16": plain},
    }
    answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
