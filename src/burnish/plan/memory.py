"""Bytes on each rank, by part: what stays (weights, gradients, optimizer) and what a forward needs.

Weights and optimizer are exact sums. Activations and buffers are estimates: their factors were measured as
the bytes that autograd saves in transformers' Llama (bf16 autocast and fp32), per token and width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from burnish.config.schema import Config
from burnish.plan.optimizer_state import optimizer_bytes, trainable_params
from burnish.plan.shapes import ModelShape

_HEAD_CHUNK_ROWS = 1024
"""Supervised positions whose logits exist at the same time."""
_NF4_BYTES = 0.5 + 4 / 64
"""A weight in 4 bits, and a float of scale for each block of 64."""
_BUCKET_ELEMENTS = 500_000_000
"""Of DeepSpeed's reduce and gather buckets, at most."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on one rank's device, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    """Logits of one chunk, and the gradients that the head's loss forms in the forward."""
    buffers: int
    """Communication buckets, gathered layers, casts."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """By name, with the total."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Memory:
    """What one rank needs: on its device, and offloaded to the host or to NVMe."""

    device: MemoryParts
    host_bytes: int
    nvme_bytes: int


@dataclass(frozen=True)
class _Setup:
    """The config, read for arithmetic."""

    deepspeed: bool
    stage: int
    ranks: int
    compute_bytes: int
    """Of an element in the forward."""
    trainable: int
    optimizer_bytes: int
    """The optimizer's state of all of them."""
    frozen: int
    frozen_bytes: int
    """Of a frozen element that is not quantised."""
    quantized: int
    """Frozen weights kept in 4 bits."""


def uses_deepspeed(config: Config, world_size: int) -> bool:
    """Whether `engine.kind` means DeepSpeed for this many ranks."""
    return config.engine.kind == "deepspeed" or (config.engine.kind == "auto" and world_size > 1)


def estimate_memory(
    config: Config, shape: ModelShape, world_size: int, micro_tokens: int, supervised_share: float = 1.0
) -> Memory:
    """Bytes that one rank needs at the peak of a step.

    Args:
        config: Dtype, adapter, engine, checkpointing. `activation_checkpointing: auto` counts as none.
        shape: The model.
        world_size: All ranks.
        micro_tokens: Most tokens of one forward, padding included.
        supervised_share: Share of those that are targets.
    """
    setup = _read(config, shape, world_size)
    rows = micro_tokens // config.engine.sequence_parallel
    weights, gradients, optimizer = _states(setup)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": _activations(config, setup, shape, rows),
        "head": _head(config, setup, shape, rows, supervised_share),
        "buffers": _buffers(setup, shape),
    }
    offloaded = {"none": 0, "cpu": 0, "nvme": 0}
    if setup.deepspeed and config.engine.offload_optimizer != "none":
        # The fp32 masters and their gradients' shard go with the optimizer.
        offloaded[config.engine.offload_optimizer] += parts["optimizer"]
        parts["optimizer"] = 0
    if setup.deepspeed and setup.stage == 3 and config.engine.offload_params != "none":
        offloaded[config.engine.offload_params] += parts["weights"]
        parts["weights"] = 0
    return Memory(MemoryParts(**parts), offloaded["cpu"], offloaded["nvme"])


def _read(config: Config, shape: ModelShape, world_size: int) -> _Setup:
    deepspeed = uses_deepspeed(config, world_size)
    trainable = trainable_params(config, shape)
    frozen = shape.num_params - (trainable if config.adapter is None else 0)
    stage = config.engine.zero_stage if deepspeed else 0
    compute_bytes = 4 if config.model.dtype == "fp32" else 2
    quantize = config.adapter is not None and config.adapter.quantize is not None
    # bitsandbytes quantises linear layers, not experts' fused parameters.
    matrices = [m for layer in shape.layers for m in layer if m.copies == 1 and m.name != "router"]
    linear = sum(m.d_in * m.d_out for m in matrices)
    return _Setup(
        deepspeed=deepspeed,
        stage=stage,
        ranks=world_size,
        compute_bytes=compute_bytes,
        trainable=trainable,
        optimizer_bytes=optimizer_bytes(config, shape),
        frozen=frozen,
        # Parts frozen in a model that is trained whole were loaded like the rest of it.
        frozen_bytes=4 if config.adapter is None and not stage else compute_bytes,
        quantized=linear if quantize else 0,
    )


def _states(setup: _Setup) -> tuple[int, int, int]:
    """Weights, gradients, optimizer, as ZeRO shards them (Rajbhandari et al., 2020, figure 1).

    Without ZeRO the model's weights are the fp32 masters, cast in the forward; ZeRO keeps weights and
    gradients in the compute dtype and the masters beside the optimizer's moments.
    """

    def shard(num: int | float, from_stage: int) -> int:
        return int(num / setup.ranks) if setup.stage >= from_stage else int(num)

    kept = setup.compute_bytes if setup.stage else 4
    masters = 4 if setup.stage and setup.compute_bytes == 2 else 0
    frozen = (setup.frozen - setup.quantized) * setup.frozen_bytes + setup.quantized * _NF4_BYTES
    return (
        shard(setup.trainable * kept + frozen, 3),
        shard(setup.trainable * kept, 2),
        shard(setup.optimizer_bytes + setup.trainable * masters, 1),
    )


def _layer_bytes_per_token(setup: _Setup, shape: ModelShape) -> int:
    """Saved for the backward by one layer, per token.

    Measured: 26 bytes a channel of the residual stream (norms run in fp32), the query, key, value and
    attention output once before and once after, and of the MLP the gate, the up projection, the
    activation and the product.
    """
    element = setup.compute_bytes
    stream = 26 if element == 2 else 24
    mlp = (4 if shape.gated_mlp else 2) * element
    attention = 2 * element * (shape.query_size + shape.kv_size)
    return stream * shape.hidden_size + attention + mlp * shape.mlp_width


def _activations(config: Config, setup: _Setup, shape: ModelShape, rows: int) -> int:
    layer = _layer_bytes_per_token(setup, shape)
    kept_stream = (2 if setup.stage and setup.compute_bytes == 2 else 4) * shape.hidden_size
    kind = config.model.activation_checkpointing
    if kind == "full":  # the input of every layer, and one layer in full while it is computed again
        return int(rows * (shape.num_layers * kept_stream + layer))
    if kind == "light":  # norms and the MLP's element-wise part are computed again
        again = 16 * shape.hidden_size + 2 * setup.compute_bytes * shape.mlp_width
        return int(rows * (shape.num_layers * (layer - again) + layer))
    return int(rows * shape.num_layers * layer)


def _head(config: Config, setup: _Setup, shape: ModelShape, rows: int, supervised_share: float) -> int:
    supervised = max(1, int(rows * supervised_share))
    logits = min(_HEAD_CHUNK_ROWS, supervised) * shape.vocab_size * (setup.compute_bytes + 4)
    hidden = 2 * supervised * shape.hidden_size * setup.compute_bytes
    trains_head = config.adapter is None or bool(shape.new_tokens)
    grad_weight = shape.embedding_params * 4 if trains_head else 0
    return logits + hidden + grad_weight


def _buffers(setup: _Setup, shape: ModelShape) -> int:
    if not setup.stage:
        # Autocast keeps a cast copy of every weight from the forward to the end of the backward.
        return setup.trainable * 2 if setup.compute_bytes == 2 else 0
    bucket = min(_BUCKET_ELEMENTS, setup.trainable) * setup.compute_bytes
    # ZeRO casts a rank's share of the gradients to fp32 for the step.
    step = 4 * setup.trainable // setup.ranks if setup.compute_bytes == 2 else 0
    gathered = 0
    if setup.stage == 3:  # two layers at a time, and the embedding or the head
        layer = shape.layer_params // max(1, shape.num_layers)
        gathered = setup.compute_bytes * (2 * layer + shape.embedding_params)
    return (bucket if setup.ranks > 1 and setup.stage < 3 else 0) + step + gathered
