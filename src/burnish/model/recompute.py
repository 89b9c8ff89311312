"""What the backward computes again instead of keeping: the levels between speed and memory.

    none      everything is kept
    light     kept: a layer's input, what its large matrix products and its attention gave;
              computed again: norms, rotations, activations, gates, adapters' second products
    full      kept: a layer's input; computed again: the layer
    offload   as full, the inputs in the host's memory

`light` is selective activation checkpointing (Korthikanti et al., 2022, arXiv:2205.05198) with
PyTorch's `create_selective_checkpoint_contexts`: it looks at operations, not at modules, so it is the
same for every decoder whose layers transformers can compute again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from torch._ops import OpOverload
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from burnish.errors import ConfigError, Problem
from burnish.model.surrogate import REFUSALS, build_surrogate

Level = Literal["none", "light", "full", "offload", "auto"]
"""`auto` is made one of the others by the plan, before there is a model."""

# Which argument holds the left matrix, whose last dimension is summed over.
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::_grouped_mm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
_CHEAP_SHARE = 4
"""A product over at most hidden width / 4 is computed again: LoRA's way up, a head's scores."""


@final
class Region:
    """A part of a layer that is computed again by itself, whatever the layer keeps: entered around it."""

    def __init__(self) -> None:
        self.entered = False

    def __enter__(self) -> None:
        self.entered = True

    def __exit__(self, *_: object) -> None:
        self.entered = False


def recompute_layers(model: PreTrainedModel, level: Level, apart: Region) -> None:
    """Let every layer of a model compute again in the backward what `level` does not keep.

    Args:
        model: Without an adapter yet, or with one.
        level: See above; `none` changes nothing.
        apart: Of what is computed in it, `light` keeps nothing.

    Raises:
        ConfigError: The model's layers cannot be computed again, or not so.
    """
    if level == "auto":
        raise ValueError("auto has to be resolved from the memory plan")
    if level == "none":
        return
    if not model.supports_gradient_checkpointing:
        name = type(model).__name__
        what = f"{name} cannot compute its layers again"
        raise ConfigError(Problem("model.activation_checkpointing", what, "Set it to none."))
    # Non-reentrant: the only kind that works with frozen inputs and keyword arguments.
    arguments: dict[str, Any] = {"use_reentrant": False}
    if level == "light":
        width = model.config.get_text_config(decoder=True).hidden_size
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _Keep(width, apart))
        _require_kept_unchanged(model, arguments)
    _enable(model, arguments)
    if level == "offload":
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=_offloaded)


def _enable(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    # The name that every transformers 5 has. Later ones call it deprecated: to be renamed with 6.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(arguments)


def _require_kept_unchanged(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Try `light` on a small model of the same architecture: what is kept must not be written over, as
    gpt-oss's experts do."""
    small = build_surrogate(model)
    if small is None:
        return
    tokens = torch.arange(8)[None] % small.config.get_text_config(decoder=True).vocab_size
    _enable(small.train(), arguments)
    try:
        with torch.random.fork_rng(devices=[]):
            small(input_ids=tokens, use_cache=False).logits.sum().backward()
    except REFUSALS as error:
        if "has been mutated" not in str(error):
            return  # the small model does not run like this; that says nothing of `light`
        what = f"is light, but layers of {type(model).__name__} write over what it keeps"
        cure = "Use none, or full where memory is short."
        raise ConfigError(Problem("model.activation_checkpointing", what, cure)) from error


def _offloaded(function: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint` whose inputs wait in the host's memory: on CUDA in pinned memory. The host waits for
    each copy there (`save_on_cpu` blocks), not for those back; on a CPU they stay where they are."""
    # Inside, `checkpoint` puts its own hooks over these: they see what it keeps, the layer's inputs.
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, use_reentrant=False)


@final
@dataclass(frozen=True)
class _Keep:
    """Which results of a layer's forward are kept: asked for every operation."""

    hidden_size: int
    apart: Region

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """PyTorch's question; asked in the forward only."""
        del context
        if self.apart.entered or not isinstance(operation, OpOverload):
            return CheckpointPolicy.PREFER_RECOMPUTE
        name = operation.name()
        if name in _PRODUCTS:
            summed_over = args[_PRODUCTS[name]].shape[-1]
            kept = summed_over * _CHEAP_SHARE > self.hidden_size
        else:
            kept = "attention" in name or "attn" in name
            # A kept result draws no random numbers when the rest of the layer is computed again, and
            # the rest would draw others than it did.
            kept = kept and not _drops_out(operation, args, kwargs)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _drops_out(operation: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names = [argument.name for argument in operation._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return any("dropout" in name and bool(value) for name, value in given.items())
