"""Folders that appear whole or not at all, and that are read back before anybody relies on them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from burnish.durable import fsync_path, give_usual_mode
from burnish.errors import MachineError, Problem


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A staging folder that takes the place of `folder` when the block ends without an error.

    Whatever stood there stays until the new one is complete; after an error nothing has changed.

    Raises:
        MachineError: The disk is full or not writable.
    """
    staging = folder.with_name(f".{folder.name}.staging")
    old = folder.with_name(f".{folder.name}.old")
    try:
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        give_usual_mode(staging.rglob("*.safetensors"))
        for path in (*staging.rglob("*"), staging):
            fsync_path(path)
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # what safetensors raises is no OSError, even for a full disk
        cure = "Free disk space, or choose another place."
        raise MachineError(Problem(str(folder), f"cannot be written: {error}", cure)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def prove_weights(folder: Path, wanted: Mapping[str, torch.Tensor]) -> set[str]:
    """Read every tensor in the folder's safetensors back and compare it with what was meant, bit for bit.

    Families whose files use other names than the model (fused experts) cannot be compared by name: there
    every tensor has elements, and no element is missing.

    Args:
        folder: Holds `*.safetensors`.
        wanted: The weights by the model's names; of tied ones, one name is enough in the files.

    Returns:
        Names in the files that the model does not have.

    Raises:
        MachineError: What was written is not what was meant.
    """
    found: dict[str, int] = {}
    problems = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(name)
                found[name] = tensor.numel()
                if tensor.numel() == 0:
                    problems.append(f"{name} has no elements")
                elif name in wanted and not same_bits(tensor, wanted[name].cpu()):
                    problems.append(f"{name} differs from what was trained")
    renamed = found.keys() - wanted.keys()
    problems += _missing(found, wanted, by_name=not renamed)
    if problems:
        cure = "Export again; if it stays, please report a bug."
        raise MachineError(Problem(str(folder), "; ".join(problems[:5]), cure))
    return set(renamed)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit (so NaN agrees with itself)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, two = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, two)


def _missing(found: Mapping[str, int], wanted: Mapping[str, torch.Tensor], by_name: bool) -> list[str]:
    """What was not written. Tied weights are one storage under several names."""
    storages = {name: tensor.data_ptr() for name, tensor in wanted.items()}
    if by_name:
        written = {storages[name] for name in found if name in storages}
        return [f"{name} is missing" for name, storage in storages.items() if storage not in written]
    num_wanted = sum({storages[name]: tensor.numel() for name, tensor in wanted.items()}.values())
    num_found = sum(found.values())
    return [f"{num_wanted - num_found} weights are missing"] if num_found < num_wanted else []
