"""Compiled layers in a process without the shape checks of tests, which the compiler cannot read.

    python compiled_worker.py CASES.json RESULTS.pt

A case has the keys of `PLAIN` in test_compiled.py; its result has loss and gradients of a few micro-batches,
and what the compiler counted.
"""

from __future__ import annotations

import json
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from flash_stand_in import stand_in_for_flash_attention
from tiny_models import FAMILIES, build, gradients, make_documents
from torch._dynamo.utils import counters

from breadth.batches import collate
from breadth.families import build as build_small
from burnish.config.schema import AdapterConfig
from burnish.model import document_attention
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.compiled import compile_layers
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel

COMPILE = torch.nn.Module.compile
KERNEL_FOR = document_attention.kernel_for
LENGTHS = ((9, 17, 1, 12, 5), (30, 2), (6, 3, 21, 8))


def trained(case: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of micro-batches of several lengths."""
    torch._dynamo.reset()
    counters.clear()
    device = torch.device(case["device"])
    document_attention.kernel_for = (lambda *_: "varlen") if case["varlen"] else KERNEL_FOR
    family = case["family"]
    model = build(family, **case["changes"]) if family in FAMILIES else build_small(family)
    capability = can_isolate(model)
    adapted = adapt(model, AdapterConfig(rank=4, alpha=8) if case["adapter"] else None, case["level"])
    supervised = SupervisedModel(adapted, capability).train()
    torch.nn.Module.compile = partialmethod(COMPILE, backend=case["backend"])
    compile_layers(adapted, capability, device, case["wanted"])
    with torch.no_grad():  # an adapter begins as nothing: then its way down has no gradient
        for name, parameter in supervised.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    supervised.to(device)
    losses, found = [], []
    for lengths in LENGTHS:
        supervised.zero_grad()
        batch = to_device(collate(make_documents(lengths=lengths), capability.packed), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=case["bf16"]):
            loss = supervised(batch)
        loss.backward()
        losses.append(loss.item())
        found.append({name: g.cpu().clone() for name, g in gradients(supervised).items()})
    counted = {kind: dict(numbers) for kind, numbers in counters.items()}
    return {"losses": losses, "gradients": found, "counted": counted}


def main() -> None:
    """Every case, in turn."""
    cases, results = sys.argv[1:]
    stand_in_for_flash_attention()
    torch.save({name: trained(case) for name, case in json.loads(Path(cases).read_text()).items()}, results)


if __name__ == "__main__":
    main()
