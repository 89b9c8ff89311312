"""What is looked at in every family, each against the model's own `model(labels=...)`.

Gradients are compared by parameter: the largest difference over the largest entry, or over a hundredth of
the model's largest gradient where that is more (the bias of keys has a gradient of 0 that rounds to noise).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from breadth.batches import Documents, collate, make_documents
from breadth.families import build, families
from burnish.config.schema import AdapterConfig
from burnish.errors import ConfigError
from burnish.model.adapt import adapt
from burnish.model.anatomy import causal_model
from burnish.model.attention import Capability, can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.model.surrogate import REFUSALS
from burnish.records import NO_TARGET

BOUND = 1e-5
SEEN_FILE = Path(__file__).parent / "seen.json"
CPU = torch.device("cpu")
YES = "yes"
UNSEEN = "not looked at"

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """What was found of a family. A check says `yes`, or what went otherwise."""

    family: str
    aliases: list[str]
    """Model types that are the same class."""
    packed: bool
    reason: str
    attention: str
    fused_head: bool
    equal: str
    """Loss and every gradient of a micro-batch are those of its documents alone."""
    apart: str
    """The logits of a document do not change with its neighbours."""
    lora: str
    recompute: str
    zero3: str = UNSEEN


def read_seen() -> dict[str, Seen]:
    """What is committed, by family."""
    rows = json.loads(SEEN_FILE.read_text("utf-8")) if SEEN_FILE.exists() else []
    return {row["family"]: Seen(**row) for row in rows}


def write_seen(rows: Sequence[Seen]) -> None:
    """Commit to it."""
    ordered = sorted((asdict(row) for row in rows), key=lambda row: row["family"])
    SEEN_FILE.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")


def look(family: str) -> Seen:
    """All checks that one process can do."""
    model = build(family)
    try:
        capability = can_isolate(model)
    except ConfigError as refusal:
        return _refused(family, str(refusal).splitlines()[0])
    documents = make_documents()
    expected = reference(build(family), documents)
    found = ours(model, capability, documents)
    return Seen(
        family=family,
        aliases=families()[family],
        packed=capability.packed,
        reason=capability.reason.split(":")[0],
        attention=capability.attention,
        fused_head=capability.fused_head,
        equal=compared(found, expected),
        apart=_apart(model, capability, documents),
        lora=_lora(family, documents),
        recompute=_recomputed(family, documents, found),
    )


def _refused(family: str, why: str) -> Seen:
    checks = dict.fromkeys(("equal", "apart", "lora", "recompute", "zero3"), "refused")
    return Seen(family, families()[family], False, why, "-", False, **checks)


def reference(model: Any, documents: Documents, attention: str = "eager") -> tuple[float, Gradients]:
    """Loss and gradients of each document alone: its mean turned back into a sum, one call for each
    distinct weight (labels know no weights)."""
    causal_model(model).set_attn_implementation(attention)
    model.train()
    shifts = _shifts_labels(model, documents[0][0])
    total = torch.zeros((), dtype=torch.float64)
    for tokens, weights in documents:
        ids = torch.from_numpy(tokens)[None]
        for weight in sorted(set(weights[1:]) - {0}):
            labels = torch.where(torch.from_numpy(weights == weight)[None], ids, NO_TARGET)
            labels[:, 0] = NO_TARGET
            if not shifts:
                labels = labels.roll(-1, 1)
            count = int((labels != NO_TARGET).sum())
            own = model(input_ids=ids, labels=labels, use_cache=False).loss
            total = total + own.double() * count * float(weight)
    total.backward()
    return float(total.detach()), gradients(model)


def _shifts_labels(model: Any, tokens: np.ndarray) -> bool:
    """Whether `model(labels=...)` compares labels with the position before; decoders of BART's kin
    leave that to the caller."""
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
    moved = functional.cross_entropy(outputs.logits[0, :-1].double(), ids[0, 1:])
    stays = functional.cross_entropy(outputs.logits[0].double(), ids[0])
    return bool((outputs.loss - moved).abs() < (outputs.loss - stays).abs())


def ours(model: Any, capability: Capability, documents: Documents) -> tuple[float, Gradients]:
    """Loss and gradients of one micro-batch of all documents."""
    supervised = SupervisedModel(model, capability).train()
    loss = supervised(to_device(collate(documents, capability.packed), CPU))
    loss.backward()
    return float(loss.detach()), gradients(model)


def gradients(model: torch.nn.Module) -> Gradients:
    """Every parameter's, zeros where there is none; then they are forgotten."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            found[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    model.zero_grad(set_to_none=True)
    return found


def compared(found: tuple[float, Gradients], expected: tuple[float, Gradients], bound: float = BOUND) -> str:
    """`yes`, or what differs most."""
    difference = abs(found[0] - expected[0]) / abs(expected[0])
    if not difference <= bound:
        return f"loss differs by {difference:.0e}"
    name, gap = largest_gap(found[1], expected[1])
    return YES if gap <= bound else f"gradient of {name} differs by {gap:.0e}"


def largest_gap(found: Gradients, expected: Gradients) -> tuple[str, float]:
    """The parameter whose gradients differ most, and how much (see the top)."""
    assert found.keys() == expected.keys()
    assert any(bool(gradient.any()) for gradient in expected.values())
    floor = 1e-2 * max(float(gradient.abs().max()) for gradient in expected.values())
    gaps = {}
    for name, gradient in expected.items():
        largest = max(float(gradient.abs().max()), floor)
        gaps[name] = float((found[name].double() - gradient.double()).abs().max()) / largest
    worst = max(gaps, key=lambda name: float("inf") if np.isnan(gaps[name]) else gaps[name])
    return worst, gaps[worst]


def _apart(model: Any, capability: Capability, documents: Documents) -> str:
    """Another text in every other document, of the same length and of another."""
    which = 2
    before = _logits(model, capability, documents, which)
    for lengths in ((9, 17, 12, 5), (11, 4, 12, 16)):
        others = list(make_documents(1, lengths))
        others[which] = documents[which]
        after = _logits(model, capability, others, which)
        gap = float((before - after).abs().max() / before.abs().max())
        if not gap <= BOUND:
            return f"logits change by {gap:.0e}"
    return YES


def _logits(model: Any, capability: Capability, documents: Documents, which: int) -> torch.Tensor:
    """The logits of one document of a micro-batch."""
    batch = to_device(collate(documents, capability.packed), CPU)
    arguments = {"position_ids": batch.position_ids} if capability.packed else {}
    with torch.no_grad():
        causal = causal_model(model).eval()
        logits = causal(
            input_ids=batch.token_ids, attention_mask=batch.attention_mask, use_cache=False, **arguments
        ).logits
    length = len(documents[which][0])
    if not capability.packed:
        return logits[which, :length]
    begin = sum(len(tokens) for tokens, _ in documents[:which])
    return logits[0, begin : begin + length]


def with_adapter(family: str, **changes: Any) -> Any:
    """An adapter on all linear layers, whose effect is not 0."""
    config = AdapterConfig(**{"rank": 2, "alpha": 4, **changes})
    model = adapt(build(family), config, "none", seed=3)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def _lora(family: str, documents: Documents) -> str:
    try:
        return _with_lora(family, documents)
    except REFUSALS as error:
        return _shown(error)


def _shown(error: Exception) -> str:
    return f"no: {type(error).__name__}, {str(error).splitlines()[0]}"


def _with_lora(family: str, documents: Documents) -> str:
    model = with_adapter(family)
    capability = can_isolate(model)
    return compared(ours(model, capability, documents), reference(with_adapter(family), documents))


def _recomputed(family: str, documents: Documents, expected: tuple[float, Gradients]) -> str:
    try:
        model = adapt(build(family), None, "full")
        return compared(ours(model, can_isolate(model), documents), expected)
    except ConfigError:
        return "refused"
    except REFUSALS as error:
        return _shown(error)
