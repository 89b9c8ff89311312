"""What is trained, and how many bytes each optimizer keeps for it. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from burnish.config.patterns import names_part
from burnish.config.schema import Config
from burnish.plan.shapes import ModelShape, short_name

_MOMENT_BYTES = 4
"""fp32."""
_BLOCK_ELEMENTS = 256
"""That share one fp32 scale in 8-bit state."""
_NAMES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}


@dataclass(frozen=True)
class _Weight:
    """Equal weights under one name, as Llama and most others call it."""

    name: str
    rows: int
    columns: int
    copies: int = 1
    inside: bool = True
    """A matrix of a layer, and no embedding, head or vector."""

    @property
    def num_params(self) -> int:
        return self.rows * self.columns * self.copies

    @property
    def factored(self) -> int:
        """Numbers that Adafactor keeps: one for each row and column of a matrix."""
        return self.copies * (self.rows + self.columns) if self.rows > 1 else self.num_params


def trainable_params(config: Config, shape: ModelShape) -> int:
    """Parameters with a gradient: the model's that are not frozen, or the adapter's.

    `model.freeze` counts by the names that Llama uses; inside an adapter it is not looked at.
    """
    return sum(weight.num_params for weight in _trained(config, shape))


def names_are_known(config: Config, shape: ModelShape) -> bool:
    """Whether `trainable_params` counts every part that the config names; it is an estimate otherwise."""
    adapter = config.adapter
    if adapter is None:
        names = [weight.name for weight in _weights(shape)]
        return all(any(names_part(pattern, name) for name in names) for pattern in config.model.freeze)
    known = {matrix.name for layer in shape.layers for matrix in layer}
    named = () if adapter.targets == "all-linear" else adapter.targets
    return not config.model.freeze and all(short_name(target) in known for target in named)


def optimizer_bytes(config: Config, shape: ModelShape) -> int:
    """Bytes of the optimizer's state over all trained parameters, fp32 masters not counted.

    adamw keeps two moments, adamw_8bit both in a byte and a scale for each block, muon one moment for
    matrices inside layers and AdamW's two for the rest, adafactor one number a row and a column.
    """
    name, trained = config.optim.name, list(_trained(config, shape))
    num_params = sum(weight.num_params for weight in trained)
    if name == "adamw_8bit":
        return 2 * num_params + 2 * _MOMENT_BYTES * num_params // _BLOCK_ELEMENTS
    if name == "adafactor":
        return _MOMENT_BYTES * sum(weight.factored for weight in trained)
    if name == "muon":
        inside = sum(weight.num_params for weight in trained if weight.inside)
        return _MOMENT_BYTES * (2 * num_params - inside)
    return 2 * _MOMENT_BYTES * num_params


def _trained(config: Config, shape: ModelShape) -> Iterator[_Weight]:
    if config.adapter is not None:
        rank, total = config.adapter.rank, shape.lora_params(config.adapter)
        # Pairs of rank by width, as wide in all as the adapter is large; DoRA's magnitudes may be left.
        yield _Weight("lora", rank, total // rank)
        yield _Weight("lora_magnitude_vector", 1, total % rank, inside=False)
        return
    for weight in _weights(shape):
        names = (weight.name, "lm_head.weight") if shape.tied and "embed" in weight.name else (weight.name,)
        if not any(names_part(pattern, name) for pattern in config.model.freeze for name in names):
            yield weight


def _weights(shape: ModelShape) -> Iterator[_Weight]:
    """All of the model's, as many as `shape.num_params` counts."""
    yield _Weight("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size, inside=False)
    if not shape.tied:
        yield _Weight("lm_head.weight", shape.vocab_size, shape.hidden_size, inside=False)
    yield _Weight("model.norm.weight", 1, shape.other_params, inside=False)
    for number, layer in enumerate(shape.layers):
        prefix = f"model.layers.{number}"
        norms = shape.norm_params_per_layer
        yield _Weight(f"{prefix}.input_layernorm.weight", 1, norms, inside=False)
        for matrix in layer:
            name = f"{prefix}.{_NAMES.get(matrix.name, f'mlp.{matrix.name}_proj')}"
            yield _Weight(f"{name}.weight", matrix.d_out, matrix.d_in, matrix.copies)
            if matrix.bias:
                yield _Weight(f"{name}.bias", 1, matrix.d_out, matrix.copies, inside=False)
