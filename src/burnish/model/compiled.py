"""A model's layers compiled one by one: norms, rotations, activations and casts become a few kernels.

`torch.compile` of a layer and not of the model (regional compilation): layers share their code, so that the
first one's kernels are everybody's, and compiling takes a minute whatever the depth. Sizes stay open
(`dynamic=True`): packed rows are of another length in every micro-batch, and kernels that were made for one
length would be made again for the next.

    not compiled      +- norm | q k v | rotate | attention | o | add | norm | gate up | act | down | add -+
    compiled          +- norm | q k v | rotate | attention | o | add+norm   | gate up | act | down | add -+
                         casts within the neighbours

What a compiled layer keeps for its backward, the compiler chooses: cheap operations are computed again, as
with `activation_checkpointing: light`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from burnish.errors import ConfigError, MachineError, Problem
from burnish.model.anatomy import body_of, causal_model
from burnish.model.attention import Capability
from burnish.model.last_layer import last_layer
from burnish.runtime import cxx_compiler


def compile_layers(model: nn.Module, capability: Capability, device: torch.device, wanted: bool) -> None:
    """Have every layer compiled when it is first called, in training and in evaluation.

    Names of weights stay as they are. Nothing is done to heads, embeddings and vision parts.

    Args:
        model: A causal language model, adapted or not, after `can_isolate`: trials need no kernels.
        capability: What was found there.
        device: Where it will be computed.
        wanted: `model.compile`, as resolved; nothing is done without it.

    Raises:
        ConfigError: The model is not made of layers that transformers knows as such.
        MachineError: There is nothing to compile with.
    """
    if not wanted:
        return
    problem = cannot_compile(model, capability, device)
    if problem is not None:
        raise problem
    # What the compiler cannot do runs as it is, and torch says so: a scan of Mamba with open sizes, say.
    torch._dynamo.config.suppress_errors = True
    for region in _regions(model, capability):
        region.compile(dynamic=True)


def cannot_compile(
    model: nn.Module, capability: Capability, device: torch.device
) -> ConfigError | MachineError | None:
    """What there is not: a compiler, or layers that it knows. None if there is both."""
    cure = "Leave model.compile out, or install it: apt install g++."
    if cxx_compiler() is None:
        return MachineError(Problem("model.compile", "there is no C++ compiler", cure))
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        cure = "Leave model.compile out, or install triton, which torch for CUDA comes with."
        return MachineError(Problem("model.compile", "triton is not installed", cure))
    if next(_regions(model, capability), None) is None:
        what = f"{type(causal_model(model)).__name__} has no layers that could be compiled"
        return ConfigError(Problem("model.compile", what, "Leave it out."))
    return None


def _regions(model: nn.Module, capability: Capability) -> Iterator[nn.Module]:
    causal = causal_model(model)
    body = body_of(causal) or causal
    # The forward of a layer that is computed at supervised rows is another one in every micro-batch: its
    # parts are not.
    in_parts = last_layer(body) if capability.whole_last_layer is None else None
    for module in body.modules():
        if module is in_parts:
            yield from module.children()
        elif isinstance(module, GradientCheckpointingLayer):
            yield module
