"""Whether a model's layers say to the attention function which window their mask has.

A trial on a few tokens cannot see a window of thousands. But transformers' mask makers are told the
window, and so are the attention functions of families that pass `sliding_window`. Here a model runs
once with a mask maker that writes the window into the mask and an attention function that compares
it with what the layer passes. Ours believes the layer, so the two have to agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

PROBE_NAME = "burnish_window_probe"

_CAUSAL, _OTHER = 0, 1


def windows_disagree(
    model: PreTrainedModel, run: Callable[[], Any], longest: int | None = None
) -> str | None:
    """Run the model once and compare, layer by layer.

    Args:
        model: Its attention implementation is changed.
        run: Runs it on one document, without a mask.
        longest: Tokens of the longest document, in which wider windows hide nothing; None if not known.

    Returns:
        None if mask and layer agree everywhere; otherwise where they do not.
    """
    findings: list[str] = []

    def probe(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        del others
        findings.extend(_compare(type(module).__name__, attention_mask, sliding_window, longest))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(PROBE_NAME, probe)
    AttentionMaskInterface.register(PROBE_NAME, _telling_mask)
    model.set_attn_implementation(PROBE_NAME)
    run()
    return findings[0] if findings else None


def _telling_mask(
    *_: Any,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> torch.Tensor:
    """A mask that holds its own description: `[window or 0, kind]`."""
    del others
    kind = _CAUSAL if _is_causal_window(mask_function, local_size) else _OTHER
    return torch.tensor([[[[local_size or 0, kind]]]], dtype=torch.int32, device=device)


def _is_causal_window(allowed: Callable[..., Any], window: int | None) -> bool:
    """Whether a mask is causal with a sliding window, and not in chunks or with an open prefix."""
    pairs = [(0, 0, True), (0, 1, False), (3, 0, True), (3, 4, False)]
    if window is not None:
        pairs = [(0, 0, True), (0, 1, False), (window, 1, True), (window, 0, False)]
        pairs += [(window + 1, 2, True), (window + 1, 1, False)]
    zero = torch.tensor(0)
    seen = [allowed(zero, zero, torch.tensor(query), torch.tensor(key)) for query, key, _ in pairs]
    return [bool(s) for s in seen] == [expected for _, _, expected in pairs]


def _compare(layer: str, mask: torch.Tensor | None, passed: int | None, longest: int | None) -> list[str]:
    if mask is None or mask.dtype != torch.int32 or mask.numel() != 2:
        return [f"{layer} makes a mask of its own"]
    window, kind = mask.flatten().tolist()
    if kind != _CAUSAL:
        return [f"{layer} is causal in chunks, or not only causal"]
    hides = [bool(w) and (longest is None or w < longest) for w in (window, passed)]
    if window != (passed or 0) and any(hides):
        return [f"{layer} has a window of {window or 'all'} tokens and passes {passed} to attention"]
    return []
