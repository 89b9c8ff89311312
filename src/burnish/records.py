"""What crosses a border between rooms: one frozen record per border, shapes in the type.

Arrays are numpy, so that preparing and planning need no torch; `model/forward.py` moves a
`MicroBatch` to the device. Under pytest, jaxtyping and beartype check every shape here.

Shape names: `tokens` (of one example), `rows` and `columns` (of a micro-batch: one row of many
documents when packed, one row per document when padded), `documents`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

NO_TARGET = -100
"""The target of a position whose next token is not trained on."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, as every source is normalised to.

    `extra` holds what templates may read besides role and content (`tool_calls`,
    `tool_call_id`, `name`, `reasoning_content`), in the shape that chat templates expect.
    """

    role: str
    """`system`, `developer`, `user`, `assistant` or `tool`."""
    content: str | list[dict[str, Any]] | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    train: bool | None = None
    """None: as `data.train_on` says. False: never trained on. True: trained on if assistant."""
    weight: float = 1.0
    """Weight of this message's tokens in the loss; 0 is the same as `train: false`."""


@dataclass(frozen=True)
class Conversation:
    """One row, normalised: messages for a chat template, plain text, or ready-made tokens.

    Exactly one of `messages`, `text` and `token_ids` is set.
    """

    source: str
    row: str
    """Where the row stands, `file:line` (or `file#index`), for every message about it."""
    messages: Sequence[Message] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    token_ids: Sequence[int] | None = None
    token_weights: Sequence[float] | None = None
    """With `token_ids`: the weight of each token as a target, 0 where it is not trained on."""


@dataclass(frozen=True)
class Example:
    """One training example: tokens and their mask, born together.

    `weights[i]` belongs to token i *as a target* (the model sees tokens before i and has to
    produce i). The shift to targets happens once, in `data/collate.py`.
    """

    source: str
    row: str
    token_ids: Int32[np.ndarray, " tokens"]
    weights: Float32[np.ndarray, " tokens"]
    """0 where the token is not trained on; positive = trained."""

    @property
    def trained(self) -> Bool[np.ndarray, " tokens"]:
        """True where the token itself is a target. The first token never is (nothing predicts
        it), whatever its weight."""
        mask = self.weights > 0
        mask[:1] = False
        return mask


@dataclass(frozen=True)
class Vocabulary:
    """What a run's tokenizer asks of the model's embedding and head."""

    named: frozenset[int] = frozenset()
    """Tokens of `model.add_tokens`."""
    new: frozenset[int] = frozenset()
    """Those of them that the tokenizer did not have: no row was ever trained for them."""
    multiple: int | None = None
    """Rows are filled up to a multiple of this."""

    def num_rows(self, before: int) -> int:
        """Rows of the embedding, where there were `before`: room for every token named."""
        needed = max([before, *(token + 1 for token in self.named)])
        multiple = self.multiple or 1
        return -(-needed // multiple) * multiple

    def fresh(self, before: int) -> tuple[int, ...]:
        """Tokens that nothing has been learned for, where the embedding had `before` rows. A spare row
        that the embedding had may be theirs."""
        return tuple(sorted(self.new | {token for token in self.named if token >= before}))


@dataclass(frozen=True)
class SharedRow:
    """How documents of a packed row share their beginnings, and which targets its positions have.

    The row is a tree of segments, depth first (`data/prefix_tree.py`). A position may have several
    targets, one for each way in which documents go on behind it.
    """

    segments: Int32[np.ndarray, "3 segments"]
    """Columns at which segments begin, stop, and at which the segments below them end."""
    columns: Int64[np.ndarray, " targets"]
    """The column that has to produce each target."""
    targets: Int64[np.ndarray, " targets"]
    weights: Float32[np.ndarray, " targets"]
    """Loss weight of each target, summed over the documents that share it."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward sees. Packed: one row, documents end to end. Padded: a row per document.

    Documents, in order, have lengths `document_lengths`; packed, document d occupies columns
    `sum(lengths[:d])` to `sum(lengths[:d+1])` of row 0; padded, the first `lengths[d]` columns
    of row d. A micro-batch without examples (a rank whose share of a window is empty) holds one
    document with weight 0, so that every rank runs the same collectives.
    """

    token_ids: Int64[np.ndarray, "rows columns"]
    position_ids: Int64[np.ndarray, "rows columns"]
    """Restarts at 0 in every document."""
    targets: Int64[np.ndarray, "rows columns"]
    """Token that the position has to produce, NO_TARGET where there is none."""
    weights: Float32[np.ndarray, "rows columns"]
    """Loss weight of `targets`, 0 where there is none."""
    document_lengths: Int32[np.ndarray, " documents"]
    example_ids: Int64[np.ndarray, " documents"]
    """Example numbers; -1 for the stand-in document of an empty micro-batch."""
    packed: bool
    first_column: int = 0
    """Where the columns here begin in the row, where ranks share it out among them: `document_lengths`
    are those of the whole row all the same."""
    shared: SharedRow | None = None
    """Where documents share their beginnings: then the row is shorter than `document_lengths` say, and the
    targets stand here alone (`targets` above is NO_TARGET everywhere)."""

    @property
    def num_tokens(self) -> int:
        """Tokens of real examples, padding and stand-ins not counted."""
        return int(self.document_lengths[self.example_ids >= 0].sum())


@dataclass(frozen=True)
class Window:
    """The examples of one optimizer step, and how they are cut among ranks and forwards.

    Everything but `cuts` is a pure function of data, seed, epoch and step.
    """

    step: int
    """1 for the first optimizer step of the run."""
    epoch: int
    """0 for the first pass."""
    example_ids: Int64[np.ndarray, " examples"]
    total_weight: float
    """Sum of the loss weights of every target in the window, over all ranks: the denominator."""
    num_tokens: int
    num_supervised_tokens: int
    cuts: Sequence[Sequence[Int64[np.ndarray, " _documents"]]]
    """`cuts[rank][m]`: the example numbers of micro-batch m on that rank. Every rank has the
    same number of micro-batches; one may be empty."""
    num_computed_tokens: int | None = None
    """Tokens that forwards compute where examples of a micro-batch share their beginnings; None: nothing
    is shared in this window, and every one of `num_tokens` is computed."""


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step reports. Numbers are never rounded; None means not measured."""

    step: int
    epoch: float
    """Passes over the data after this step: 0.5 is half an epoch."""
    loss: float
    lr: float
    grad_norm: float | None
    """Global L2 norm before clipping."""
    applied: bool
    """False when the step was skipped because a gradient was not finite."""
    num_examples: int
    num_tokens: int
    num_supervised_tokens: int
    seconds: float
    peak_memory_bytes: int | None
    example_ids: Sequence[int]
    num_micro_batches: int
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    """Where this rank's time went: `data` (waiting for micro-batches), `forward`, `backward`, `update` and
    `other`; together `seconds`. Empty where it was not measured."""

    @property
    def tokens_per_second(self) -> float:
        """All tokens of the window, those of all ranks and no padding, over the step's time."""
        return self.num_tokens / self.seconds if self.seconds > 0 else float("nan")


@dataclass(frozen=True)
class EvalStats:
    """Token-weighted loss on held-out data; `sources` has the same per source."""

    step: int
    loss: float
    perplexity: float
    num_supervised_tokens: int
    sources: Mapping[str, Mapping[str, float | int]]
    seconds: float


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, besides what the engine saves. Plain JSON, no pickle."""

    step: int
    """Optimizer steps done. The data position: windows 1..step are consumed."""
    epoch: int
    num_examples: int
    num_tokens: int
    num_supervised_tokens: int
    best_eval_loss: float | None
    best_eval_step: int | None
    num_skipped_in_a_row: int
    rng: Mapping[str, Any]
    """Random state of every rank: `{"0": {...}, "1": {...}}`, JSON-able."""
    fingerprints: Mapping[str, str]
    """What the run was made from and a resumed run must share, by name: values where they are short, else
    hashes (`checkpoint/fingerprints.py`)."""
    versions: Mapping[str, str]
    world_size: int
    eval_due: bool = False
    """The evaluation of this step is still to come, or its best result could not be exported: a signal came
    first, or the disk was full. Whoever goes on from here makes up for it."""
