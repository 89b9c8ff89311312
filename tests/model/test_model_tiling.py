"""MLPs in tiles: the same numbers, and nothing as wide as an MLP for all tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build, gradients, make_documents
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from breadth.batches import collate
from burnish.config.schema import AdapterConfig
from burnish.errors import ConfigError
from burnish.model import tiling
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.model.recompute import Level
from burnish.model.tiling import tiled_modules

CPU = torch.device("cpu")
TILE_TOKENS = 7
NUM_TOKENS = 44
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "cohere", "granite")
LORA = AdapterConfig(rank=4, alpha=8, dropout=0.3)


class Widest(TorchDispatchMode):
    """The most rows of any result that is `columns` wide."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 3 and result.shape[-1] == self.columns:
            self.rows = max(self.rows, result.numel() // self.columns)
        return result


def trained(
    family: str, tile_tokens: int | None, level: Level = "none", adapter: AdapterConfig | None = None
) -> dict[str, Any]:
    model = build(family, intermediate_size=44) if family == "llama" else build(family)
    capability = can_isolate(model)
    adapted = adapt(model, adapter, level, mlp_tile_tokens=tile_tokens)
    supervised = SupervisedModel(adapted, capability).train()
    with torch.no_grad():
        for name, parameter in supervised.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    batch = to_device(collate(make_documents(), capability.packed), CPU)
    with torch.no_grad():
        evaluated = supervised(batch, per_document=True)
    torch.manual_seed(7)
    with Widest(44) as widest:
        loss = supervised(batch)
        loss.backward()
    return {
        "loss": loss.detach(),
        "evaluated": evaluated,
        "gradients": gradients(supervised),
        "rows": widest.rows,
        "tiled": tiled_modules(supervised),
    }


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("loss", "evaluated"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=0)
    assert found["gradients"].keys() == expected["gradients"].keys()
    largest = max(gradient.abs().max() for gradient in expected["gradients"].values())
    for name, gradient in expected["gradients"].items():
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-6 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_same_numbers(family: str) -> None:
    found = trained(family, TILE_TOKENS)
    assert len(found["tiled"]) == 2  # one in each layer
    same(found, trained(family, None))


@pytest.mark.parametrize("level", ["none", "light", "full", "offload"])
def test_whatever_else_is_computed_again(level: Level) -> None:
    same(trained("llama", TILE_TOKENS, level), trained("llama", None))


def test_with_an_adapter() -> None:
    # Without dropout: tiles draw other random numbers than the whole does.
    adapter = LORA.model_copy(update={"dropout": 0.0})
    same(trained("llama", TILE_TOKENS, "light", adapter), trained("llama", None, "none", adapter))
    # With: the same numbers again in the backward, or gradients would not be the loss's.
    dropped = trained("llama", TILE_TOKENS, "none", LORA)
    same(trained("llama", TILE_TOKENS, "full", LORA), dropped)


@pytest.mark.parametrize("level", ["none", "light", "full"])
def test_nothing_wide_is_whole(level: Level) -> None:
    assert trained("llama", None, level)["rows"] == NUM_TOKENS
    assert trained("llama", TILE_TOKENS, level)["rows"] == TILE_TOKENS


def test_light_keeps_nothing_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept products of tiles would add up to the whole again."""
    kept: list[int] = []
    monkeypatch.setattr(
        tiling.TiledForward, "_tile", _noting_policy(kept, tiling.TiledForward._tile), raising=True
    )
    trained("llama", TILE_TOKENS, "light")
    assert kept and not any(kept)


def _noting_policy(kept: list[int], original: Any) -> Any:
    from torch.utils.checkpoint import _CachingTorchDispatchMode, _VersionWrapper

    def tile(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        caching = [mode for mode in modes if isinstance(mode, _CachingTorchDispatchMode)]

        def saved() -> int:
            entries = [e for mode in caching for by_index in mode.storage.values() for e in by_index.values()]
            return sum(
                isinstance(leaf, _VersionWrapper)
                for entry in entries
                for leaf in torch.utils._pytree.tree_leaves(entry)
            )

        before = saved()
        result = original(self, hidden)
        if caching:
            kept.append(saved() - before)
        return result

    return tile


def test_padded_rows_are_cut_too() -> None:
    """Tokens of all rows together make a tile."""
    documents = make_documents(lengths=(9, 17, 5))
    losses = []
    for tile_tokens in (None, 6):
        model = build("llama")
        capability = can_isolate(model, packing="off")
        supervised = SupervisedModel(adapt(model, None, "none", mlp_tile_tokens=tile_tokens), capability)
        losses.append(supervised(to_device(collate(documents, packed=False), CPU)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_mixes_tokens_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward

    def mixing(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return plain(self, hidden) + hidden.mean(1, keepdim=True)

    monkeypatch.setattr(LlamaMLP, "forward", mixing)
    with pytest.raises(ConfigError, match="no MLP that can be cut"):
        adapt(build("llama"), None, "none", mlp_tile_tokens=TILE_TOKENS)
