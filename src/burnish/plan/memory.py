"""Bytes on each rank, by part: what stays (weights, gradients, optimizer) and what a micro-batch needs.

What stays is an exact sum. What comes and goes is followed through a step; the largest of these is the peak,
and its parts are the plan's:

    the head      all layers' activations, and what the head's loss forms in the forward
    the backward  all layers' activations, the head's gradient, and inside one layer its gradients and what is
                  computed again; ZeRO's bucket
    its end       no activations; the whole gradients, and the embedding's beside them
    the step      no activations; ZeRO's shard of the gradients made ready for the optimizer

Gradients are there from the first micro-batch of a step on; with one a step, they come as activations go, and
the larger of the two counts. All this is what tensors hold. An allocator takes more from the machine: a GPU's
takes fragments, which are not in the plan; on a CPU the C library keeps freed memory where there is room, and
the plan has that as a part (`in_process`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from burnish.config.schema import Config
from burnish.plan.activations import Activations, Forward, activations
from burnish.plan.optimizer_state import optimizer_bytes, trainable_params
from burnish.plan.shapes import ModelShape
from burnish.plan.sizes import size_met_again

_HEAD_CHUNK_ROWS = 1024
"""Supervised positions whose logits exist at the same time."""
_NF4_BYTES = 0.5 + 4 / 64
"""A weight in 4 bits, and a float of scale for each block of 64."""
_BUCKET_ELEMENTS = 50_000_000
"""Of DeepSpeed's reduce bucket, at most (engine/ds_config.py)."""
_BUCKET_ELEMENTS_CPU = 5_000_000
"""The same at stages 1 and 2 on CPUs."""
_LIVE_ELEMENTS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered, and that it makes ready for the optimizer at once, at most:
DeepSpeed's `stage3_max_live_parameters` and `sub_group_size`."""
_COMPILED_BYTES_CPU = 96 * 2**20
"""Products that torch compiles for bf16 on a CPU and keeps (`host_memory.bound_kernel_caches`)."""
_PROCESS_BYTES = 2**29
"""Of Python and the libraries: 470 to 550 MiB were measured on Linux, with and without DeepSpeed."""
_KEPT_SHARE = 0.5
"""Freed memory that the C library keeps, beside what tensors hold at most."""
USABLE_MEMORY = 0.92
"""Share of a device's memory that a run may plan with: the rest is the driver's and fragmentation's."""
_SOFTMAX_BYTES_CPU, _SOFTMAX_BYTES_CUDA = 4 * 2**20, 256 * 2**20
"""fp32 logits worked on at once (model/head.py); three of them exist."""


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
    """Communication buckets, gathered layers, casts, compiled products."""
    process: int = 0
    """On a CPU: Python and the libraries."""
    kept: int = 0
    """On a CPU: freed memory that is not returned at once."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())

    @property
    def tensors(self) -> int:
        """What the model needs: all parts but the process and what is kept."""
        return self.total - self.process - self.kept

    def to_dict(self) -> dict[str, int]:
        """By name, with the total."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Memory:
    """What one rank needs: on its device, and offloaded to the host or to NVMe."""

    device: MemoryParts
    host_bytes: int
    nvme_bytes: int

    @property
    def over_process(self) -> int:
        """What a process on a CPU, where host and device are one, may hold beside Python and libraries."""
        return self.device.tensors + self.device.kept + self.host_bytes


def in_process(memory: Memory, free_bytes: int | None) -> Memory:
    """The memory of a process that trains on a CPU: what tensors need, what Python and the libraries take,
    and freed memory that is kept, which makes steps faster, if there is room for it.

    Args:
        memory: What tensors need.
        free_bytes: What the process may take; None where that is not known.
    """
    needed = memory.device.tensors + memory.host_bytes
    kept = int(needed * _KEPT_SHARE)
    if free_bytes is not None and needed + kept > free_bytes * USABLE_MEMORY:
        kept = 0
    return replace(memory, device=replace(memory.device, process=_PROCESS_BYTES, kept=kept))


@dataclass(frozen=True)
class _Setup:
    """The config, read for arithmetic."""

    stage: int
    ranks: int
    offloads: bool
    """The optimizer's part is off the device."""
    forward: Forward
    trainable: int
    cast: int
    """Trained weights that autocast casts, and keeps cast until the backward is through."""
    optimizer_bytes: int
    """The optimizer's state of all of them."""
    frozen: int
    frozen_bytes: int
    """Of a frozen element that is not quantised."""
    quantized: int
    """Frozen weights kept in 4 bits."""
    beside_bytes: int
    """Of frozen weights beside the language model, which never run."""
    trains_head: bool
    accumulates: bool
    """A step has several micro-batches."""

    def shard(self, num: int | float, from_stage: int) -> int:
        """A rank's share of what is sharded from that stage on."""
        return int(num / self.ranks) if self.stage >= from_stage else int(num)


def estimate_memory(
    config: Config,
    shape: ModelShape,
    world_size: int,
    micro_tokens: int,
    supervised_share: float = 1.0,
    accumulates: bool = True,
    device_type: str = "cuda",
) -> Memory:
    """Bytes that one rank needs at the peak of a step.

    Args:
        config: Dtype, adapter, engine, checkpointing. `activation_checkpointing: auto` counts as none.
        shape: The model.
        world_size: All ranks.
        micro_tokens: Most tokens of one forward, padding included.
        supervised_share: Share of those that are targets.
        accumulates: Whether a step has more than one micro-batch.
        device_type: `cuda` or `cpu`, whose kernels keep different things.
    """
    setup = _read(config, shape, world_size, accumulates, device_type)
    rows = micro_tokens // config.engine.sequence_parallel
    if setup.forward.on_cpu and setup.forward.element == 2 and config.engine.sequence_parallel == 1:
        rows = size_met_again(rows)
    acts = activations(config, setup.forward, shape, rows)
    static = _states(setup)
    supervised = max(1, int(rows * supervised_share))
    peak = max(_moments(setup, static, shape, acts, supervised), key=lambda parts: parts.total)
    if setup.forward.on_cpu and setup.forward.element == 2:
        peak = replace(peak, buffers=peak.buffers + _COMPILED_BYTES_CPU)
    offloaded = {"none": 0, "cpu": acts.host, "nvme": 0}
    if setup.offloads:
        # Of each trained weight: master and state, and on the host its gradient too, in fp32 and as it came.
        offloaded[config.engine.offload_optimizer] += static.optimizer
        offloaded["cpu"] += setup.shard(setup.trainable * 6, 1)
        peak = replace(peak, optimizer=0)
    if setup.stage == 3 and config.engine.offload_params != "none":
        offloaded[config.engine.offload_params] += peak.weights
        peak = replace(peak, weights=0)
    return Memory(peak, offloaded["cpu"], offloaded["nvme"])


def _read(config: Config, shape: ModelShape, world_size: int, accumulates: bool, device_type: str) -> _Setup:
    stage = config.engine.zero_stage if config.engine.uses_deepspeed(world_size) else 0
    whole, element = config.adapter is None, 4 if config.model.dtype == "fp32" else 2
    trainable = trainable_params(config, shape)
    quantize = config.adapter is not None and config.adapter.quantize is not None
    # bitsandbytes quantises linear layers, not experts' fused parameters.
    matrices = [m for layer in shape.layers for m in layer if m.copies == 1 and m.name != "router"]
    linear = sum(m.d_in * m.d_out for m in matrices)
    masters = whole and not stage  # the model's weights are fp32, trained or not
    outside = shape.num_params - shape.layer_params
    frozen_bytes = 4 if masters else element
    packed = shape.kept_matrices if quantize else 0
    autocast = element == 2 and not stage
    return _Setup(
        stage=stage,
        ranks=world_size,
        offloads=stage > 0 and config.engine.offload_optimizer != "none",
        forward=Forward(
            element, 4 if masters else element, autocast, config.adapter, on_cpu=device_type == "cpu"
        ),
        trainable=trainable,
        cast=max(0, trainable - (outside if whole else 0)) if autocast else 0,
        optimizer_bytes=optimizer_bytes(config, shape),
        frozen=shape.num_params - (trainable if whole else 0),
        frozen_bytes=frozen_bytes,
        quantized=linear if quantize else 0,
        beside_bytes=int((shape.kept_params - packed) * frozen_bytes + packed * _NF4_BYTES),
        trains_head=whole or bool(shape.new_tokens),
        accumulates=accumulates,
    )


def _states(setup: _Setup) -> MemoryParts:
    """Weights, gradients, optimizer, as ZeRO shards them (Rajbhandari et al., 2020, figure 1).

    Without ZeRO the model's weights are the fp32 masters, and gradients are fp32. ZeRO keeps weights in the
    forward's dtype, the masters beside the optimizer's moments, and gradients in fp32: at stage 1 all of
    them, at 2 and 3 a rank's share.
    """
    element = setup.forward.element
    kept = element if setup.stage else 4
    # Stages 1 and 2 copy a rank's share of the weights whatever their dtype.
    masters = 4 if setup.stage in (1, 2) or (setup.stage and element == 2) else 0
    frozen = (setup.frozen - setup.quantized) * setup.frozen_bytes + setup.quantized * _NF4_BYTES
    return MemoryParts(
        weights=setup.shard(setup.trainable * kept + frozen + setup.beside_bytes, 3),
        gradients=0 if setup.offloads else setup.shard(setup.trainable * 4, 2),
        optimizer=setup.shard(setup.optimizer_bytes + setup.trainable * masters, 1),
        activations=0,
        head=0,
        buffers=0,
    )


def _moments(
    setup: _Setup, static: MemoryParts, shape: ModelShape, acts: Activations, supervised: int
) -> Iterator[MemoryParts]:
    """What is on the device at each moment of a step that may be its peak."""
    e, table = setup.forward.element, shape.embedding_params
    bucket, gathered, ready = _zero_buffers(setup)
    before = static.gradients if setup.accumulates or setup.stage == 3 else 0
    casts = setup.cast * 2
    head_grad = table * (e if setup.stage else 4) if setup.trains_head else 0
    held = replace(static, gradients=before, activations=acts.kept)
    yield replace(held, head=_head(setup, shape, supervised), buffers=casts + gathered)
    # Gradients come as activations go: of a step's only micro-batch the larger of the two.
    coming = max(0, static.gradients - before - acts.kept)
    inside = acts.again + acts.backward
    yield replace(
        held,
        gradients=before + coming,
        activations=acts.kept + inside,
        head=head_grad,
        buffers=casts + gathered + bucket,
    )
    end = head_grad * (2 if shape.tied else 1)
    yield replace(static, head=end, buffers=gathered + bucket)
    yield replace(static, buffers=ready)


def _head(setup: _Setup, shape: ModelShape, supervised: int) -> int:
    """The head's loss: one chunk of logits, whose gradient takes their place, and what is worked on in fp32.

    Where the head is trained: its gradient in fp32, one chunk's share of it, and under autocast a cast of
    the matrix. Of each supervised position its hidden state, a cast, the same weighted, and its gradient.
    """
    forward, table = setup.forward, shape.embedding_params
    block = _SOFTMAX_BYTES_CPU if forward.on_cpu else _SOFTMAX_BYTES_CUDA
    logits = min(_HEAD_CHUNK_ROWS, supervised) * shape.vocab_size
    hidden = supervised * shape.hidden_size * (2 * forward.stream + 2 * forward.element)
    total = logits * forward.element + 3 * min(block, 4 * logits) + hidden
    if setup.trains_head:
        total += table * (4 + forward.element + (2 if forward.autocast else 0))
    return total


def _zero_buffers(setup: _Setup) -> tuple[int, int, int]:
    """ZeRO's: the bucket that gradients are reduced in, weights gathered, gradients made ready for the step.

    The bucket is in the gradients' dtype (fp32 at stage 1), and is cut up anew for the ranks at stage 3,
    where it is never given back. Stage 3 keeps what it gathered until 1,000 million weights are live, and
    copies its share of the gradients for the step.
    """
    if not setup.stage:
        # Plain data parallel: buckets of 64 MiB at the step only, where no activations are.
        return 0, 0, 0
    element = 4 if setup.stage == 1 else setup.forward.element
    most = _BUCKET_ELEMENTS_CPU if setup.forward.on_cpu and setup.stage < 3 else _BUCKET_ELEMENTS
    bucket = min(most, setup.trainable) * element
    if setup.stage < 3:
        # Beside a GPU one is filled while the other is on its way.
        return bucket if setup.forward.on_cpu else 2 * bucket, 0, 0
    whole = setup.trainable * setup.forward.element + (setup.frozen - setup.quantized) * setup.frozen_bytes
    gathered = min(whole, _LIVE_ELEMENTS * setup.forward.element) if setup.ranks > 1 else 0
    share = min(setup.shard(setup.trainable, 3), _LIVE_ELEMENTS)
    return 2 * bucket, gathered, 4 * share
