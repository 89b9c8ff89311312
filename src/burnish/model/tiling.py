"""MLPs in tiles: a long micro-batch's MLP is computed some tokens at a time, and again in the backward.

An MLP's intermediate results are several times as wide as its input, and with long documents they are
the peak of a step. It treats every token alike and apart, so it can be cut along the tokens:

    input    [ t t t t t t t t t t ]      kept, and one output of the same size
    tiles    [ t t t t ] [ t t t t ] [ t t ]
                  wide        wide     wide      only one of these exists at a time

The idea is known from ALST (Bekman et al., 2025, arXiv:2506.13996). Which modules can be cut is found by
trial, not by name: they are tried on a small model of the same architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from burnish.errors import ConfigError, Problem
from burnish.model.recompute import Region
from burnish.model.surrogate import REFUSALS, build_surrogate

_PROBE_TOKENS = 11
_PROBE_CUT = 4


@final
class TiledForward:
    """The forward of a module that treats every token apart, tile by tile.

    Args:
        forward: The module's own.
        tile_tokens: Tokens of a tile, those of all rows together.
        region: Told while tiles are computed.
    """

    def __init__(self, forward: Callable[..., Any], tile_tokens: int, region: Region) -> None:
        self._forward = forward
        self._tile_tokens = tile_tokens
        self._region = region

    def __call__(
        self, hidden: Float[torch.Tensor, "rows columns width"]
    ) -> Float[torch.Tensor, "rows columns width"]:
        """What the module's own forward gives."""
        columns = max(1, self._tile_tokens // hidden.shape[0])
        if hidden.shape[1] <= columns:
            return self._forward(hidden)
        with self._region:
            tiles = [self._tile(tile) for tile in hidden.split(columns, dim=1)]
        return torch.cat(tiles, dim=1)

    def _tile(self, tile: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self._forward(tile)
        return checkpoint(self._forward, tile, use_reentrant=False)  # pyright: ignore[reportReturnType]


def tile_layers(model: PreTrainedModel, tile_tokens: int, region: Region) -> None:
    """Let a model's MLPs be computed in tiles.

    Args:
        model: Without an adapter yet.
        tile_tokens: Tokens of a tile. A micro-batch that is no longer is computed whole.
        region: Told while tiles are computed.

    Raises:
        ConfigError: The model has no part that treats every token apart.
    """
    kinds = _token_wise_kinds(model)
    if not kinds:
        name = type(model).__name__
        what = f"{name} has no MLP that can be cut along its tokens"
        raise ConfigError(Problem("model.mlp_tile_tokens", what, "Leave it out."))
    for kind, module in _kinds(model):
        if kind in kinds:
            # On the instance: names of weights stay, and so does what engines hang on its call.
            module.forward = TiledForward(module.forward, tile_tokens, region)


def tiled_modules(model: nn.Module) -> Sequence[nn.Module]:
    """Modules whose forward is tiled. An engine that shards weights must gather them around the module's
    whole call: ranks differ in their number of tiles."""
    return [m for m in model.modules() if isinstance(m.__dict__.get("forward"), TiledForward)]


@dataclass(frozen=True)
class _Kind:
    """A module's place in a layer, the same in a small model as in a large one."""

    parent: type
    name: str
    module: type


def _kinds(model: nn.Module) -> Iterator[tuple[_Kind, nn.Module]]:
    for parent in model.modules():
        for name, module in parent.named_children():
            yield _Kind(type(parent), name, type(module)), module


def _token_wise_kinds(model: PreTrainedModel) -> set[_Kind]:
    """Modules of several matrices that are called with one tensor of all tokens, and treat every token
    apart; not those inside of others."""
    small = build_surrogate(model)
    if small is None:
        return set()
    inputs: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(args) == 1 and not kwargs and _is_hidden(args[0]) and _is_hidden(output):
            inputs[module] = args[0]

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in small.modules()]
    vocabulary = small.config.get_text_config(decoder=True).vocab_size
    with torch.no_grad():
        small(input_ids=torch.arange(_PROBE_TOKENS)[None] % vocabulary, use_cache=False)
        for hook in hooks:
            hook.remove()
        several = [m for m in inputs if sum(p.dim() > 1 for p in m.parameters()) > 1]
        found = {module for module in several if _is_token_wise(module, inputs[module])}
    inner = {part for module in found for part in module.modules() if part is not module}
    refused = {kind for kind, module in _kinds(small) if module in several and module not in found}
    return {kind for kind, module in _kinds(small) if module in found and module not in inner} - refused


def _is_hidden(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] == _PROBE_TOKENS


def _is_token_wise(module: nn.Module, hidden: torch.Tensor) -> bool:
    whole = module(hidden)
    if whole.shape != hidden.shape:
        return False
    try:
        cut = [module(tile) for tile in (hidden[:, :_PROBE_CUT], hidden[:, _PROBE_CUT:])]
        turned = module(hidden.flip(1)).flip(1)
    except REFUSALS:
        return False
    return all(torch.allclose(whole, other, rtol=1e-4, atol=1e-5) for other in (torch.cat(cut, 1), turned))
