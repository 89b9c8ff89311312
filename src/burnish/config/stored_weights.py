"""Weights that a checkpoint stores in fewer bits: which of them can be trained, and how. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from burnish.config.schema import Config
from burnish.errors import Problem

UNPACKED = ("mxfp4", "fp8")
"""Methods whose weights transformers turns back into bf16 while it loads them."""
_PLAIN = "Give the checkpoint that it was made from, with its weights in bf16."


def packing_of(model_config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`quantization_config` of a config.json, wherever it stands; None where weights are whole."""
    text = model_config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = model_config.get("quantization_config") or nested
    return found if isinstance(found, Mapping) else None


def cannot_train_stored(
    model_config: Mapping[str, Any],
    init: Literal["pretrained", "random"],
    quantize: Literal["nf4"] | None,
) -> Problem | None:
    """Why a checkpoint's weights cannot be trained as they are stored; None where they can.

    Args:
        model_config: Its config.json.
        init: `model.init`; fresh weights are stored nowhere.
        quantize: `adapter.quantize`.
    """
    packing = packing_of(model_config)
    if packing is None or init == "random":
        return None
    method = str(
        packing.get("quant_method") or ("bitsandbytes" if packing.get("load_in_4bit") else "unknown")
    )
    if method in UNPACKED:
        if quantize is None:
            return None
        what = f"is {quantize}, but the checkpoint's weights are in {method} already, and are trained in bf16"
        return Problem("adapter.quantize", what, f"Leave it out. Or: {_PLAIN}")
    if method == "bitsandbytes" and packing.get("load_in_4bit"):
        if quantize is not None:
            return None
        what = "the checkpoint's weights are in 4 bits, which can only be a frozen base for an adapter"
        return Problem("model.path", what, f"Set adapter.quantize: nf4. Or: {_PLAIN}")
    return Problem(
        "model.path", f"the checkpoint's weights are quantised ({method}): nothing trains them", _PLAIN
    )


def cannot_pack(config: Config) -> Iterator[Problem]:
    """Why `adapter.quantize` has no base to pack."""
    if config.adapter is None or config.adapter.quantize is None:
        return
    how = config.adapter.quantize
    if config.adapter.kind == "pissa":
        what = f"is {how}, but pissa begins with the base's own weights, which that packs"
        yield Problem("adapter.quantize", what, "Leave it out, or use adapter.kind: lora.")
    if config.model.init == "random":
        what = f"{how} with model.init: random"
        yield Problem("adapter.quantize", what, "Quantise a pretrained model, or leave adapter.quantize out.")
