"""A small model of the same architecture, to try things on that cannot be tried on the model itself."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from burnish.runtime import seeded

REFUSALS = (TypeError, RuntimeError, ValueError, IndexError, AttributeError, KeyError, AssertionError)
"""What a model's code raises at arguments or sizes it was not written for. Wide on purpose: a
refusal, of whatever kind, is an answer to the trial."""

SMALL_VOCABULARY = 64
SMALL_INTERMEDIATE = 64


def build_surrogate(model: PreTrainedModel) -> PreTrainedModel | None:
    """The same architecture in fp32 on the CPU with few layers, a small vocabulary and thin MLPs.

    Hidden width and heads stay, because families tie them together in ways of their own.

    Returns:
        None where the family does not let itself be made small.
    """
    config = shrink(model.config)
    with seeded(0):
        try:
            # The class itself and not `from_config`: that would partition under ZeRO-3.
            return type(model)(config).float().eval()
        except REFUSALS:
            return None


def shrink(config: Any) -> Any:
    """A copy of a config with few layers (every kind of layer among them) and small tables."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    values = text.to_dict()
    text.vocab_size = min(values["vocab_size"], SMALL_VOCABULARY)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if values.get(key) is not None:
            setattr(text, key, 0)
    for key in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(values.get(key), int):
            setattr(text, key, min(values[key], SMALL_INTERMEDIATE))
    _cut_layers(text, values)
    _cut_vision(small)
    if small.to_dict().get("quantization_config") is not None:
        del small.quantization_config  # the small model is made in fp32
    return small


def _cut_vision(small: Any) -> None:
    """One layer of a vision part, which is never run."""
    if not isinstance(small.to_dict().get("vision_config"), dict):
        return
    vision = small.vision_config
    values = vision.to_dict()
    for key in ("num_hidden_layers", "depth"):
        if isinstance(values.get(key), int):
            setattr(vision, key, min(values[key], 1))


def _cut_layers(text: Any, values: dict[str, Any]) -> None:
    """Keep the first layer of every kind, wherever it is, and two at least; twice over where layers share
    keys and values."""
    layers = text.num_hidden_layers
    kinds = values.get("layer_types") or values.get("layers_block_type") or []
    chosen = sorted({kinds.index(kind) for kind in kinds})
    if len(chosen) < 2:
        chosen = list(range(min(2, layers)))
    if values.get("num_kv_shared_layers"):  # Gemma 3n's last layers look at the keys of earlier ones
        text.num_kv_shared_layers = len(chosen)
        chosen *= 2
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, key, [value[i] for i in chosen])
    text.num_hidden_layers = len(chosen)
