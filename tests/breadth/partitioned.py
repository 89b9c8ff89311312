"""A family under ZeRO-3 on two ranks, as run.py would train it: loaded in parts, its documents shared out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from breadth.batches import collate, make_documents, total_weight
from breadth.checks import BOUND, YES, reference
from breadth.families import build
from burnish.engine.build import build_engine, model_init_context, parameter_dtype
from burnish.errors import BurnishError
from burnish.model.attention import can_isolate
from burnish.model.forward import SupervisedModel
from burnish.model.load import load_model
from burnish.model.surrogate import REFUSALS
from burnish.runtime import Ranks, barrier, sum_over_ranks
from rig.toy import toy_config

PARTED = "no: its ranks part ways"
"""Sometimes that is an exception and sometimes the end of the process, and of all families after it."""
_SETTINGS = {"engine.kind": "deepspeed", "engine.zero_stage": 3, "optim.max_grad_norm": 1e9}


def partitioned(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """`yes` if the loss, and the norm of all gradients, are those of the documents alone, and packing is
    decided as for the whole model."""
    family, packed = case["family"], case["packed"]
    try:
        return {"zero3": _looked_at(family, packed, ranks, output_dir)}
    except BurnishError as refusal:
        why = str(refusal).splitlines()[0].replace(str(output_dir), "the folder")
        return {"zero3": f"refused: {why}"}
    except REFUSALS as error:
        why = str(error).splitlines()[0]
        # gloo's words, with a port in them, for ranks that do not take part in the same collective.
        parted = "gloo/transport" in why
        return {"zero3": PARTED if parted else f"no: {type(error).__name__}, {why}"}


def _looked_at(family: str, packed: bool, ranks: Ranks, folder: Path) -> str:
    documents = make_documents()
    whole = build(family)
    loss, gradients = reference(whole, documents)
    norms = torch.stack([gradient.double().norm() for gradient in gradients.values()])
    norm = float(norms.norm()) / total_weight(documents)
    if ranks.is_main:
        whole.save_pretrained(folder)
    barrier(ranks)
    config = toy_config(folder, {**_SETTINGS, "model.path": str(folder), "model.init": "pretrained"})
    device = torch.device("cpu")
    dtype = parameter_dtype(config, ranks)
    model = load_model(
        config.model,
        seed=0,
        init_context=model_init_context(config, ranks, device, dtype),
        param_dtype=dtype,
    )
    assert all(p.numel() == 0 for p in model.parameters())
    capability = can_isolate(model)
    engine = build_engine(config, ranks, device, SupervisedModel(model, capability))
    share = documents[ranks.rank :: ranks.world_size]
    found = engine.forward_backward(collate(share, capability.packed), total_weight(documents))
    found_loss = sum_over_ranks(found, ranks).item()
    found_norm = engine.step(1e-3).grad_norm
    if not abs(found_loss - loss) <= BOUND * abs(loss):
        return f"loss differs by {abs(found_loss - loss) / abs(loss):.0e}"
    if found_norm is None or not abs(found_norm - norm) <= BOUND * norm:
        return f"gradient norm is {found_norm} and not {norm}"
    return YES if capability.packed == packed else f"padded: {capability.reason}"
