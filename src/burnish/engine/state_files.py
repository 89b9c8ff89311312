"""State of a plain PyTorch model and its optimizer as safetensors: no pickle, strict on loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from burnish.durable import give_usual_mode
from burnish.errors import CheckpointError, Problem

_OF_ADAPTER = ".lora_"
"""In the name of each of peft's weights. One that `model.freeze` keeps from being trained (LoRA-FA's A) is
the adapter's all the same: without it nobody can use the others."""


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: trainable parameters, and buffers that the model saves.

    The tensors are the model's own (no copy), so copying into them restores it. A tied parameter
    appears once.
    """
    state: dict[str, torch.Tensor] = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    persistent = model.state_dict().keys() - parameter_names
    state.update({name: b for name, b in model.named_buffers() if name in persistent})
    return state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `parameter name/key`, all of it tensors.

    A parameter that was never stepped has no state and no entry. Whole numbers (the steps that
    bitsandbytes counts) become int64 scalars, which no optimizer here has of its own.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    flat: dict[str, torch.Tensor] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            flat[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value).detach()
    return flat


def restore_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, flat: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_state` gave, each tensor where the optimizer has it."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    optimizer.state.clear()
    for entry, value in flat.items():
        name, key = entry.rsplit("/", 1)
        if name not in parameters:
            raise CheckpointError(
                Problem(
                    "optimizer",
                    f"state for {name!r}, which this model does not train",
                    "Resume the run it came from.",
                )
            )
        if value.dtype == torch.int64 and value.dim() == 0:
            optimizer.state[parameters[name]][key] = int(value)
            continue
        parameter = parameters[name]
        # A fused kernel wants `step` beside its parameter; a loop in Python reads it, and waits for a GPU.
        there = value.device if key == "step" and id(parameter) not in fused else parameter.device
        optimizer.state[parameter][key] = value.to(there, copy=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to one safetensors file, which wants each to have memory of its own.

    Raises:
        OSError: It cannot be written.
    """
    seen: set[int] = set()
    on_cpu: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        copied = tensor.cpu().contiguous()
        on_cpu[name] = copied.clone() if copied.data_ptr() in seen else copied
        seen.add(copied.data_ptr())
    try:
        save_file(on_cpu, path)
        give_usual_mode([path])
    except SafetensorError as error:  # a full disk too; it is no OSError, which is what savers expect
        raise OSError(f"{path}: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read what `write_tensors` wrote, on the CPU."""
    return load_file(path)


@torch.no_grad()
def copy_exactly(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor], what: str) -> None:
    """Copy tensor by tensor into existing storage: same names, shapes and dtypes, or an error.

    Raises:
        CheckpointError: Names, shapes or dtypes differ; the first few differences are listed.
    """
    different = [
        f"{name}: {tuple(source[name].shape)} {source[name].dtype} saved, "
        f"{tuple(target[name].shape)} {target[name].dtype} here"
        for name in sorted(target.keys() & source.keys())
        if target[name].shape != source[name].shape or target[name].dtype != source[name].dtype
    ]
    different += [f"{name}: not in the checkpoint" for name in sorted(target.keys() - source.keys())]
    different += [f"{name}: only in the checkpoint" for name in sorted(source.keys() - target.keys())]
    if different:
        raise CheckpointError(
            Problem(
                what,
                f"{len(different)} tensors differ: " + "; ".join(different[:5]),
                "Resume the run it came from.",
            )
        )
    for name, tensor in target.items():
        tensor.copy_(source[name])


def exported_weights(
    model: nn.Module,
    adapter_only: bool,
    gather: Callable[[nn.Parameter], AbstractContextManager[Any]] = nullcontext,
    keep: bool = True,
) -> dict[str, torch.Tensor] | None:
    """Weights on the CPU under the model's own names; tied ones are one tensor under two names.

    Args:
        model: The Hugging Face (or peft) model itself.
        adapter_only: Leave out an adapter's base, and all buffers.
        gather: Entered around a weight; puts one that is shared out together. Every rank calls this then.
        keep: Take what was gathered; else only help others to.

    Returns:
        None if not `keep`.

    Raises:
        CheckpointError: A tensor has no elements (see `refuse_empty`).
    """
    on_cpu: dict[nn.Parameter, torch.Tensor] = {}
    exported: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if adapter_only and not (parameter.requires_grad or _OF_ADAPTER in name):
            continue
        if parameter not in on_cpu:
            with gather(parameter):
                on_cpu[parameter] = parameter.detach().cpu() if keep else parameter.new_empty(0)
        exported[name] = on_cpu[parameter]
    if not keep:
        return None
    if not adapter_only:
        saved = model.state_dict()
        exported.update({n: saved[n].detach().cpu() for n in saved.keys() - parameters.keys()})
    refuse_empty(exported)
    return exported


def refuse_empty(exported: Mapping[str, torch.Tensor]) -> None:
    """Never write a result with tensors of size 0, as partitioned weights look when not gathered.

    Raises:
        CheckpointError: There is nothing to export, or a tensor has no elements.
    """
    empty = [name for name, tensor in exported.items() if tensor.numel() == 0]
    if empty or not exported:
        found = f"{len(empty)} tensors have no elements: {', '.join(empty[:3])}" if empty else "no weights"
        raise CheckpointError(Problem("export", found, "Please report this as a bug of Burnish."))
