"""A micro-batch as tensors: what a model's forward is given.

**Sizes that are met again.** On a CPU, oneDNN compiles a bf16 product for every new size, two milliseconds
each, and packed rows are of another length in every step: of a step of 35 million parameters a fifth was
compiling. So the row and the supervised positions may be filled up to one of few sizes (`size_met_again`):

    tokens      a a a b b b b b . .      . fills up: a document of its own, without a target
    supervised    1 2     5 6 7 7        the last one again, with weight 0

Nothing else sees what fills up, and the loss and every gradient are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64

from burnish.model.document_attention import document_mask
from burnish.model.prefix_attention import prefix_mask, prefix_numbers
from burnish.plan.sizes import size_met_again
from burnish.records import NO_TARGET, MicroBatch, SharedRow
from burnish.runtime import send_array


@dataclass(frozen=True)
class DeviceBatch:
    """A `MicroBatch` on the device. Everything whose size depends on data was counted on the host,
    so that the forward never waits for the device."""

    token_ids: Int64[torch.Tensor, "rows columns"]
    position_ids: Int64[torch.Tensor, "rows columns"]
    attention_mask: torch.Tensor
    """Packed: the boundaries (`document_mask`), or the segments where documents share their beginnings
    (`prefix_mask`). Padded: 1 for tokens, 0 for padding, per row."""
    supervised: Int64[torch.Tensor, " targets"]
    """Where there is a target: numbers into the rows laid end to end."""
    targets: Int64[torch.Tensor, " targets"]
    weights: Float32[torch.Tensor, " targets"]
    documents: Int64[torch.Tensor, " targets"]
    """To which document each target belongs; 0 where documents share beginnings and targets with them."""
    lengths: Int64[torch.Tensor, " documents"]
    packed: bool
    num_filled: int = 0
    """Tokens at the end of a packed row that are nobody's."""

    @property
    def num_documents(self) -> int:
        """Documents in the micro-batch."""
        return len(self.lengths)

    def document_of_tokens(self) -> Int64[torch.Tensor, "rows columns"]:
        """To which document each position belongs, padding too; what fills a row up, to the last one."""
        numbers = torch.arange(self.num_documents, device=self.lengths.device)
        if not self.packed:
            return numbers[:, None].expand(self.token_ids.shape)
        size = self.token_ids.shape[1]  # known on the host, so that this does not wait for the device
        own = torch.repeat_interleave(numbers, self.lengths, output_size=size - self.num_filled)
        return torch.nn.functional.pad(own, (0, self.num_filled), value=self.num_documents - 1)[None]


def to_device(micro_batch: MicroBatch, device: torch.device, fill_up: bool = False) -> DeviceBatch:
    """Move a micro-batch to the device, its supervised positions gathered.

    Args:
        micro_batch: Packed or padded.
        device: Where the model is.
        fill_up: Fill a packed row and its supervised positions up to a `size_met_again`.
    """
    # A part of a row (sequence parallelism) has the length that all ranks have agreed on.
    whole = micro_batch.shared is not None or micro_batch.token_ids.size == micro_batch.document_lengths.sum()
    columns = micro_batch.token_ids.shape[1]
    fill_up = fill_up and micro_batch.packed and whole
    num_filled = size_met_again(columns) - columns if fill_up else 0
    longest = int(micro_batch.document_lengths.max(initial=1))
    supervised, targets, weights, documents = _supervised(micro_batch)
    again = size_met_again(len(supervised)) - len(supervised) if fill_up and len(supervised) else 0
    return DeviceBatch(
        token_ids=send_array(np.pad(micro_batch.token_ids, ((0, 0), (0, num_filled))), device),
        position_ids=send_array(_positions(micro_batch.position_ids, num_filled, longest), device),
        attention_mask=_mask(micro_batch, num_filled, longest, device),
        supervised=send_array(np.pad(supervised, (0, again), mode="edge" if again else "constant"), device),
        targets=send_array(np.pad(targets, (0, again), mode="edge" if again else "constant"), device),
        weights=send_array(np.pad(weights, (0, again)), device),
        documents=send_array(np.pad(documents, (0, again), mode="edge" if again else "constant"), device),
        lengths=send_array(micro_batch.document_lengths.astype(np.int64), device),
        packed=micro_batch.packed,
        num_filled=num_filled,
    )


def _supervised(micro_batch: MicroBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions with a target, the targets, their weights and documents."""
    shared = micro_batch.shared
    if shared is not None:
        return shared.columns, shared.targets, shared.weights, np.zeros(len(shared.columns), np.int64)
    targets, weights = micro_batch.targets.reshape(-1), micro_batch.weights.reshape(-1)
    # A target of weight 0 adds nothing: it is not computed.
    where = np.flatnonzero((targets != NO_TARGET) & (weights != 0)).astype(np.int64)
    lengths, (rows, columns) = micro_batch.document_lengths, micro_batch.token_ids.shape
    of_rows = np.repeat(np.arange(rows), columns)
    document_of = np.repeat(np.arange(len(lengths)), lengths) if micro_batch.packed else of_rows
    documents = document_of[where + micro_batch.first_column].astype(np.int64)
    return where, targets[where], weights[where], documents


def _positions(position_ids: np.ndarray, num_filled: int, longest: int) -> np.ndarray:
    """Positions, and for what fills up such as the model knows."""
    filled = np.arange(num_filled) % longest
    return np.concatenate([position_ids, np.broadcast_to(filled, (len(position_ids), num_filled))], axis=1)


def _mask(micro_batch: MicroBatch, num_filled: int, longest: int, device: torch.device) -> torch.Tensor:
    """What the model is given as its attention mask: see `DeviceBatch.attention_mask`."""
    columns = micro_batch.token_ids.shape[1]
    if micro_batch.shared is not None:
        segments = _segments(micro_batch.shared, columns, num_filled)
        return prefix_mask(send_array(prefix_numbers(segments), device), segments.shape[1], longest)
    lengths = micro_batch.document_lengths
    if not micro_batch.packed:
        return send_array((np.arange(columns)[None, :] < lengths[:, None]).astype(np.int64), device)
    filled = [num_filled] if num_filled else []
    bounds = np.concatenate([[0], np.cumsum([*lengths, *filled])]).astype(np.int32)
    return document_mask(send_array(bounds, device), max(longest, num_filled))


def _segments(shared: SharedRow, columns: int, num_filled: int) -> np.ndarray:
    if not num_filled:
        return shared.segments
    end = columns + num_filled
    return np.concatenate([shared.segments, [[columns], [end], [end]]], axis=1).astype(np.int32)
