"""What a LoRA adapter on all linear layers reaches, and what it does not.

`all-linear` means layers that are called as `nn.Linear` is. Two things of a model are none: weights that
belong to no linear layer (the experts of most mixtures are fused in one 3-D weight), and linear layers
whose weight is used in another way than by calling them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from burnish.errors import first_few
from burnish.model.surrogate import REFUSALS
from burnish.runtime import log

_MODEL_CODE = ("transformers.models.", "transformers_modules.")
_TOLD_FROM = 0.05
"""A share of the model's weights that is worth a warning."""


def not_called(model: PreTrainedModel) -> list[str]:
    """Linear layers to which an adapter must not be added, by name.

    They are subclasses that give something else than a linear layer does (Llama 4's router a tuple,
    DeepSeek-V4's output projection works in groups), found by trying one of each kind; and the output
    projection of Mamba layers, whose kernels read its weight without calling it (peft refuses them for
    that reason in pure Mamba models).
    """
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    plain: dict[type, bool] = {nn.Linear: True}
    names = []
    for name, module in linears.items():
        kind = type(module)
        if kind not in plain:
            # Quantised layers (bitsandbytes') keep their weight in another form; peft knows them.
            plain[kind] = not kind.__module__.startswith(_MODEL_CODE) or _is_linear(module)
        parent, _, leaf = name.rpartition(".")
        of_mamba = "mamba" in f"{parent} {type(modules.get(parent)).__name__}".lower()
        if not plain[kind] or (of_mamba and leaf == "out_proj"):
            names.append(name)
    return _shortened(names, list(linears))


def _is_linear(module: nn.Linear) -> bool:
    """Whether a layer of this class gives `x @ weight.T + bias`, tried with other weights in its place."""
    twin = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(module.out_features, module.in_features, generator=generator)
    bias = (
        None if module.bias is None else nn.Parameter(torch.randn(module.out_features, generator=generator))
    )
    twin._parameters = {**module._parameters, "weight": nn.Parameter(weight), "bias": bias}
    x = torch.randn(1, 2, module.in_features, generator=generator)
    with torch.no_grad():
        try:
            out = twin.forward(x)
        except REFUSALS:
            return False
        expected = nn.functional.linear(x, weight, bias)
    is_like = isinstance(out, torch.Tensor) and out.shape == expected.shape
    return is_like and torch.allclose(out, expected, rtol=1e-3, atol=1e-3)


def _shortened(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The last parts of names where they say as much."""
    short = {name.rsplit(".", 1)[-1] for name in names}
    kept = {name.rsplit(".", 1)[-1] for name in set(all_names) - set(names)}
    return sorted((short - kept) | {name for name in names if name.rsplit(".", 1)[-1] in kept})


def unreached_weights(model: PreTrainedModel) -> dict[str, int]:
    """Matrices and stacks of matrices in no linear layer, with how many numbers they hold.

    Embeddings, the head and convolutions are not counted: nobody expects an adapter there. Names are those
    without the layer's number.
    """
    known = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, known):
            continue
        for last, parameter in module.named_parameters(recurse=False):
            shape = full_shape(parameter)
            if len(shape) > 1:
                parts = f"{name}.{last}".split(".")
                number = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
                short = ".".join(parts[number + 1 :])
                found[short] = found.get(short, 0) + shape.numel()
    return found


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, of which ZeRO-3 may have left nothing here."""
    # `ds_shape` is put on the parameter by DeepSpeed when it partitions it; no other mark exists.
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def tell_unreached(model: PreTrainedModel) -> None:
    """Warn where all linear layers are far from all of a model."""
    unreached = unreached_weights(model)
    total = sum(full_shape(parameter).numel() for parameter in model.parameters())
    share = sum(unreached.values()) / total
    if share < _TOLD_FROM:
        return
    names = sorted(unreached, key=lambda name: -unreached[name])
    log.warning(
        "adapter.targets: all-linear leaves %.0f%% of the model's weights without an adapter, because they "
        "are in no linear layer: %s. To adapt them too, name them there beside the linear layers.",
        100 * share,
        first_few(names),
    )
