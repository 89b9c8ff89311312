"""The last decoder layer behind its attention, at supervised positions only.

Nothing looks at the last layer's output but the head, and that only where there is a target. In that layer
every position's key and value are needed, but nobody needs the second norm, the MLP and the model's last norm
of a position without a target:

    hidden     [ p p p p p a a p p p a a ]     p prompt, a supervised
    attention  [ p p p p p a a p p p a a ]     a sees every p before it
    MLP, norm            [ a a a a ]           one row, `[1, targets, width]`

Loss and gradients are the same. Whether a family's layer may be computed like this is found by trial, not by
its name: on a few tokens, against the layer's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from burnish.model.anatomy import body_of
from burnish.model.surrogate import REFUSALS
from burnish.runtime import seeded

MOST_SUPERVISED = 0.9
"""Share of supervised rows from which gathering them costs more than it saves."""

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROBE_SHAPE = (2, 7)
_TOLERANCE = 1e-5
"""Of the largest hidden state, in fp32: products of fewer rows are rounded otherwise. A layer of another
structure is off by far more."""


def last_layer(body: nn.Module) -> GradientCheckpointingLayer | None:
    """The last layer of a body, where it has the parts that `supervised_rows` computes with and no others."""
    stacks = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child) > 0]
    layer = stacks[0][-1] if len(stacks) == 1 else None
    if not isinstance(layer, GradientCheckpointingLayer) or {n for n, _ in layer.named_children()} != _PARTS:
        return None
    # Weights of the layer itself do something that its parts do not; a forward on the instance is somebody's.
    plain = not layer._parameters and not layer._buffers and "forward" not in layer.__dict__
    return layer if plain else None


@contextlib.contextmanager
def supervised_rows(
    layer: GradientCheckpointingLayer, rows: Int64[torch.Tensor, " targets"]
) -> Iterator[None]:
    """While entered, a layer returns `[1, targets, width]`: what it gives at these rows.

    The rows belong to the forward and not to the layer: one that is computed again in the backward, when
    other micro-batches may have gone through, takes its own.

    Args:
        layer: What `last_layer` found, and `verify_last_layer` let pass.
        rows: Numbers into the rows of the layer's input laid end to end.
    """
    again = layer.gradient_checkpointing
    layer.forward = partial(_forward, layer, again, rows)
    # transformers checkpoints in the forward that this one stands for; earlier (5.17) it did around the call,
    # and the backward would compute again with whatever forward the layer has by then.
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = again
        del layer.forward


def _forward(
    layer: GradientCheckpointingLayer,
    again: bool,
    rows: torch.Tensor,
    hidden_states: Float[torch.Tensor, "rows columns width"],
    **arguments: Any,
) -> Float[torch.Tensor, "1 targets width"]:
    compute = partial(_at_rows, layer, rows, arguments)
    if again and layer.training:
        return layer._gradient_checkpointing_func(compute, hidden_states)  # pyright: ignore
    return compute(hidden_states)


def _at_rows(layer: Any, rows: torch.Tensor, arguments: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)[0]
    stream = (hidden + attended).flatten(0, 1).index_select(0, rows)[None]
    return stream + layer.mlp(layer.post_attention_layernorm(stream))


def verify_last_layer(model: PreTrainedModel) -> str | None:
    """Compare a body whose last layer is computed at some rows with the same body as it is.

    At some rows without dropout; and at all of them with it, for which both draw the same random numbers if
    they draw them in the same places.

    Args:
        model: In fp32 and evaluation mode, without gradients; its attention implementation is changed.

    Returns:
        None if they are equal; otherwise what is wrong.
    """
    name, body = type(model).__name__, body_of(model)
    layer = None if body is None else last_layer(body)
    if body is None or layer is None:
        return f"{name}'s last layer is not made of a norm, attention, a norm and an MLP"
    if any(p.dtype != torch.float32 for p in layer.parameters()):
        return f"{name} could not be tried in fp32"
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    device = next(layer.parameters()).device
    tokens = torch.randint(vocabulary, _PROBE_SHAPE, generator=generator).to(device)
    every = torch.arange(tokens.numel(), device=device)
    try:
        same = _same(body, layer, tokens, every[2::3])
        body.train()
        same = same and _same(body, layer, tokens, every)
    except REFUSALS as error:
        return f"{name}'s last layer cannot be computed at some rows: {error}"
    finally:
        body.eval()
    return None if same else f"{name}'s last layer gives something else where it is computed at some rows"


def _same(
    body: nn.Module, layer: GradientCheckpointingLayer, tokens: torch.Tensor, rows: torch.Tensor
) -> bool:
    whole = _hidden(body, tokens).flatten(0, 1)[rows][None]
    with supervised_rows(layer, rows):
        some = _hidden(body, tokens)
    return some.shape == whole.shape and bool((some - whole).abs().max() <= _TOLERANCE * whole.abs().max())


def _hidden(body: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with seeded(0):
        return body(input_ids=tokens, use_cache=False)[0]
