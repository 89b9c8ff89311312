"""The weights of the adapter that a run begins with: every one of them, bit for bit, or none.

Names in an adapter's file are peft's, which leave out what peft calls an adapter inside a model. Which weight
each belongs to is found by asking peft how it would save the model that is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.integrations import gather_params_ctx
from safetensors import SafetensorError, safe_open

from burnish.config.adapter_file import WEIGHTS_FILE, doubt_about_base
from burnish.config.schema import AdapterConfig, Config
from burnish.errors import ConfigError, MachineError, Problem, first_few
from burnish.model.vocabulary import token_rows
from burnish.runtime import log

_ROWS = ".token_adapter.trainable_tokens_delta"


def tell_doubt(config: Config) -> None:
    """Say so where names cannot tell whether the base is the adapter's."""
    doubt = doubt_about_base(config)
    if doubt is not None:
        log.warning("adapter.path: %s.", doubt)


@torch.no_grad()
def begin_with(model: PeftModel, folder: Path, tokens: Iterable[int]) -> None:
    """Give an adapter the weights of a file, and prove that it has them.

    Under ZeRO-3 inside its context; weights may be partitioned already.

    Args:
        model: Adapted as the file's config says, with rows for its tokens; changed in place.
        folder: Holds `adapter_model.safetensors`.
        tokens: Whose rows the file brings, ascending. Other rows that are trained stay as they are.

    Raises:
        ConfigError: The file's weights are not those of this adapter on this base.
        MachineError: The file cannot be read, or a weight is not what the file has.
    """
    brought = list(tokens)
    parameters = dict(model.named_parameters())
    names = _names_in_file(model, parameters, with_rows=bool(brought))
    shapes = {theirs: _shape(parameters[ours]) for theirs, ours in names.items()}
    found = _shapes_in(folder)
    places: dict[str, Any] = {}
    for theirs, ours in names.items():
        places[theirs] = ...
        if theirs.endswith(_ROWS):
            known: list[int] = model.get_submodule(ours.removesuffix(".new.weight")).tokens.tolist()  # pyright: ignore
            places[theirs] = torch.tensor([known.index(token) for token in brought])
            shapes[theirs] = (len(brought), *shapes[theirs][1:])
    _require_fit(folder, shapes, found)
    wrong: list[str] = []
    with _open(folder) as file:
        for theirs, ours in names.items():
            parameter, place = parameters[ours], places[theirs]
            wanted = file.get_tensor(theirs).to(parameter.device, parameter.dtype)
            with gather_params_ctx([parameter], modifier_rank=0):
                parameter.data[place] = wanted
            with gather_params_ctx([parameter], modifier_rank=None):
                if not _same(parameter.data[place], file.get_tensor(theirs)):
                    wrong.append(theirs)
    if wrong:
        cure = "Load and save it with peft in float32; if it stays, please report a bug."
        dtype = parameters[names[wrong[0]]].dtype
        what = f"{folder}: {first_few(wrong)} cannot be held to the bit in {dtype}"
        raise MachineError(Problem("adapter.path", what, cure))
    log.info("Begun with the adapter in %s: %d weights, each compared with the file.", folder, len(names))


def require_fit(model: PeftModel, adapter: AdapterConfig) -> None:
    """Refuse a file whose weights are not this adapter's, in the words of `begin_with`; rows of tokens are
    not looked at.

    Args:
        model: Adapted as the file's config says; it may be without memory for its weights.
        adapter: With a `path`.

    Raises:
        ConfigError: Weights are missing, left over, or of another shape.
        MachineError: The file cannot be read.
    """
    assert adapter.path is not None
    folder, parameters = Path(adapter.path), dict(model.named_parameters())
    names = _names_in_file(model, parameters, with_rows=False)
    found = {name: shape for name, shape in _shapes_in(folder).items() if not name.endswith(_ROWS)}
    _require_fit(folder, {theirs: _shape(parameters[ours]) for theirs, ours in names.items()}, found)


def _names_in_file(model: PeftModel, parameters: Mapping[str, Any], with_rows: bool) -> dict[str, str]:
    """Of each weight of the adapter, its name in a file and its own."""
    stand_ins = {name: torch.empty(0) for name in parameters}
    ours_of = {id(tensor): name for name, tensor in stand_ins.items()}
    saved = get_peft_model_state_dict(model, state_dict=stand_ins, save_embedding_layers=False)
    names = {theirs: ours_of[id(tensor)] for theirs, tensor in saved.items()}
    if with_rows:
        names |= {theirs: ours for ours, theirs in token_rows(model, stand_ins)[1].items()}
    return names


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # where ZeRO-3 has partitioned it


def _open(folder: Path) -> Any:
    try:
        return safe_open(folder / WEIGHTS_FILE, framework="pt")
    except (OSError, SafetensorError) as error:
        what = f"{folder / WEIGHTS_FILE} cannot be read: {error}"
        raise MachineError(Problem("adapter.path", what, "Copy or download the folder again.")) from error


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    with _open(folder) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _require_fit(
    folder: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    base = "Is model.path the base that it was trained on?"
    again = f"{base} If so, copy or download the folder again."
    merge = f"{base} If so, merge it: burnish merge {folder} OUT; then model.path: OUT."
    missing = sorted(wanted.keys() - found.keys())
    spare = sorted(found.keys() - wanted.keys())
    sizes = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in sorted(wanted.items())
        if name in found and found[name] != shape
    ]
    lists = (
        ("are missing in the file, and would be fresh", missing, again),
        ("in the file belong to no part of this adapter", spare, merge),
        ("have another shape than this adapter on this base", sizes, base),
    )
    problems = [
        Problem("adapter.path", f"{folder}: weights {what} ({len(names):,} in all): {first_few(names)}", cure)
        for what, names, cure in lists
        if names
    ]
    if problems:
        raise ConfigError(*problems)


def _same(held: torch.Tensor, file: torch.Tensor) -> bool:
    """Whether the weights that are held are those of the file to the bit, whatever dtype it has."""
    back = held.cpu().to(file.dtype)
    return torch.equal(back, file) and torch.equal(back.to(held.dtype), held.cpu())
