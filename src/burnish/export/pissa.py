"""A PiSSA adapter as an ordinary LoRA of the base as it was published.

PiSSA (Meng et al. 2024, arXiv:2404.02948) begins by taking the base's largest singular directions out of
it and into the adapter: `W = W' + s B0 A0`. What is trained is `W' + s B A`, so an adapter alone would be
wrong on the published `W`. As `W' + s B A = W + s (B A - B0 A0)`, it is a LoRA of twice the rank:

    A_lora = [A; A0]    B_lora = [B, -B0]    the same scale s

Embeddings begin as with LoRA, nothing taken out: their `B0 A0` is 0, and the same holds of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def as_lora(
    trained: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The adapter's weights, each pair of twice the rank.

    Args:
        trained: `lora_A` of `[rank, in]` and `lora_B` of `[out, rank]`, by the model's names; those of
            embeddings are called `lora_embedding_A` and `lora_embedding_B`.
        initial: The same before the first step.
    """
    joined: dict[str, torch.Tensor] = {}
    for name, weight in trained.items():
        if "lora_A" in name or "lora_embedding_A" in name:
            joined[name] = torch.cat([weight, initial[name]], dim=0)
        elif "lora_B" in name or "lora_embedding_B" in name:
            joined[name] = torch.cat([weight, -initial[name]], dim=1)
        else:
            joined[name] = weight
    return joined


def as_lora_config(adapter_config: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in `adapter_config.json`: the rank doubles, and alpha with it, so the scale stays."""
    rank, alpha = adapter_config["r"], adapter_config["lora_alpha"]
    return {"r": 2 * rank, "lora_alpha": 2 * alpha, "init_lora_weights": True}
