"""Which examples each optimizer step sees: a pure function of data, seed, epoch and step.

    epoch 0   order = 7 2 9 | 0 4 1 | 8 3 5 | 6      windows of 3 examples, the last one smaller
    epoch 1   order = 3 8 0 | 5 9 2 | ...

World size, packing and the budget of a forward change how a window is cut among ranks (`data/pack.py`),
never what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int32, Int64

from burnish.config.schema import MAX_EPOCHS, BatchConfig, DataConfig, TrainConfig
from burnish.data.pack import Cuts, check_lengths, pack_window
from burnish.data.prefixes import Prefixes
from burnish.data.shared_packing import SharedCuts, pack_alike
from burnish.errors import ConfigError, DataError, Problem
from burnish.plan import DEFAULT_GLOBAL_EXAMPLES, DEFAULT_MICRO_TOKENS, CostModel, MicroBudget
from burnish.records import Window

_LOOK = "`burnish check CONFIG` says what became of the rows."
_MAX_STEPS = 10**8
"""Of one run: at a millisecond each more than a day, in truth years."""
_SORTED_EXAMPLES = 1 << 25
"""Put in order for planning, over all epochs: seconds."""


@runtime_checkable
class ExampleCounts(Protocol):
    """What windows need to know of the prepared examples: numbers, no tokens."""

    @property
    def num_tokens(self) -> Int64[np.ndarray, " examples"]:
        """Tokens of each example."""
        ...

    @property
    def total_weight(self) -> Float64[np.ndarray, " examples"]:
        """Sum of the loss weights of each example's targets."""
        ...

    @property
    def num_supervised(self) -> Int64[np.ndarray, " examples"]:
        """Targets of each example."""
        ...

    @property
    def source_ids(self) -> Int32[np.ndarray, " examples"]:
        """Source of each example, a position in `source_names` and in `data.train`."""
        ...

    @property
    def source_names(self) -> tuple[str, ...]:
        """Name of each source."""
        ...


def order(seed: int, epoch: int, num: int) -> Int64[np.ndarray, " num"]:
    """A permutation of `range(num)`, the same on every machine and with every version of numpy.

    Numbers are sorted by the raw output of Philox keyed by seed and epoch: numpy promises the streams of
    its bit generators to stay as they are, but not the ways of `Generator.permutation`.
    """
    keys = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(num)
    return np.argsort(keys, kind="stable")


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` in proportion to the weights, exactly, by largest remainder (Hamilton's method)."""
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def micro_budget(batch: BatchConfig, longest_tokens: int) -> MicroBudget:
    """What one forward may hold, `auto` resolved: room for the longest example at least.

    `micro_examples` alone sets no limit on tokens.
    """
    if batch.micro_tokens != "auto":
        return MicroBudget(batch.micro_tokens, batch.micro_examples)
    if batch.micro_examples is not None:
        return MicroBudget(None, batch.micro_examples)
    return MicroBudget(max(longest_tokens, DEFAULT_MICRO_TOKENS), None)


@final
class WindowPlan:
    """Every window of a run, by step. Made by `plan_windows`; keeps one epoch's order in memory."""

    def __init__(
        self,
        counts: ExampleCounts,
        data: DataConfig,
        batch: BatchConfig,
        train: TrainConfig,
        world_size: int,
        packed: bool,
        cost: CostModel,
        sharing: int,
        prefixes: Prefixes | None,
    ) -> None:
        self._counts = counts
        self._seed = train.seed
        self._shares = _source_shares(counts, data)
        self._global_tokens = batch.global_tokens
        self._global_examples = batch.global_examples or DEFAULT_GLOBAL_EXAMPLES
        self.world_size = world_size
        self._sharing = sharing
        self.packed = packed
        self.cost = cost
        self.budget = micro_budget(batch, data.max_tokens)
        limited = self.budget.tokens is not None and self.budget.examples is None
        self.prefixes = prefixes if packed and limited else None
        check_lengths(counts.num_tokens, self.budget)
        self.num_examples_per_epoch = len(counts.num_tokens)
        self._cached_order: tuple[int, Int64[np.ndarray, " examples"]] | None = None
        self._starts = self._plan_epochs(train)
        """Of each epoch: where its windows start in its order, and where the last one ends."""
        steps = np.cumsum([0] + [len(starts) - 1 for starts in self._starts])
        self._first_steps: Int64[np.ndarray, " epochs"] = steps[:-1]
        """Of each epoch: steps before it."""
        planned = int(steps[-1])
        self.num_steps = min(planned, train.max_steps or planned)
        if self.num_steps > _MAX_STEPS:
            raise _too_long(train, f"more than {_MAX_STEPS:,} steps")
        self.steps_per_epoch = len(self._starts[0]) - 1

    def window(self, step: int) -> Window:
        """The window of an optimizer step: random access, in time proportional to the window.

        Args:
            step: From 1 to `num_steps`.

        Raises:
            IndexError: There is no such step.
        """
        epoch = self._locate(step)[0]
        example_ids = self.example_ids(step)
        lengths = self._counts.num_tokens[example_ids].astype(np.int64)
        shared = self.shared_cuts(example_ids)
        if shared is None:
            cuts = pack_window(lengths, self.world_size, self.budget, self.cost, self.packed)
        else:
            cuts = shared.cuts
        return Window(
            step=step,
            epoch=epoch,
            example_ids=example_ids,
            total_weight=float(self._counts.total_weight[example_ids].sum()),
            num_tokens=int(lengths.sum()),
            num_supervised_tokens=int(self._counts.num_supervised[example_ids].sum()),
            cuts=tuple(tuple(example_ids[cut] for cut in cuts[i]) for i in self._cut_of_ranks()),
            num_computed_tokens=None if shared is None else shared.num_computed_tokens,
        )

    def shared_cuts(self, example_ids: Int64[np.ndarray, " examples"]) -> SharedCuts | None:
        """How a window of these examples is cut where beginnings are shared; None where none are."""
        alike = None if self.prefixes is None else self.prefixes.alike(example_ids)
        if alike is None:
            return None
        lengths = self._counts.num_tokens[example_ids].astype(np.int64)
        return pack_alike(lengths, alike, self.world_size, self.budget, self.cost)

    def _cut_of_ranks(self) -> Iterator[int]:
        """Which cut each rank takes, rank by rank."""
        return (i for i in range(self.world_size) for _ in range(self._sharing))

    def example_ids(self, step: int) -> Int64[np.ndarray, " examples"]:
        """The example numbers of a window, not yet cut."""
        epoch, start, stop = self._locate(step)
        return self.epoch_order(epoch)[start:stop]

    def epochs_done(self, step: int) -> float:
        """Passes over the data after this step (0 to `num_steps`): 0.5 is half an epoch."""
        if step == 0:
            return 0.0
        epoch, _, stop = self._locate(step)
        return epoch + stop / self.num_examples_per_epoch

    def epoch_order(self, epoch: int) -> Int64[np.ndarray, " examples"]:
        """Example numbers of one pass, in the order in which windows take them."""
        cached = self._cached_order
        if cached is not None and cached[0] == epoch:
            return cached[1]
        shuffled = order(self._seed, epoch, self.num_examples_per_epoch)
        if self._shares is not None:
            shuffled = self._mixture(epoch, self._shares)[shuffled]
        self._cached_order = (epoch, shuffled)
        return shuffled

    def epoch_starts(self, epoch: int) -> Int64[np.ndarray, " windows_plus_1"]:
        """Where windows of an epoch start in its order, and where the last one ends; up to `num_steps`."""
        num_windows = min(len(self._starts[epoch]) - 1, self.num_steps - int(self._first_steps[epoch]))
        return self._starts[epoch][: num_windows + 1]

    @property
    def num_epochs(self) -> int:
        """Epochs begun, a partial one included."""
        return self._locate(self.num_steps)[0] + 1

    @property
    def num_examples(self) -> int:
        """Over the whole run, repeats counted."""
        epoch, _, stop = self._locate(self.num_steps)
        return epoch * self.num_examples_per_epoch + stop

    def _locate(self, step: int) -> tuple[int, int, int]:
        if not 1 <= step <= self.num_steps:
            raise IndexError(f"step {step} is not between 1 and {self.num_steps}")
        epoch = int(np.searchsorted(self._first_steps, step - 1, side="right")) - 1
        k = step - 1 - int(self._first_steps[epoch])
        return epoch, int(self._starts[epoch][k]), int(self._starts[epoch][k + 1])

    def _plan_epochs(self, train: TrainConfig) -> list[Int64[np.ndarray, " windows_plus_1"]]:
        """Cut every epoch into windows; the last epoch may be a fraction, and its last window smaller.

        With `max_steps`, whole epochs follow each other until there are enough windows.

        Raises:
            ConfigError: They are so many that planning them would take longer than anybody waits.
        """
        num = self.num_examples_per_epoch
        # With `global_tokens` every epoch has to be put in order to be cut.
        sortable = MAX_EPOCHS if self._global_tokens is None else max(100, _SORTED_EXAMPLES // num)
        most = min(MAX_EPOCHS, sortable)
        # Rounded, so that 1.1 epochs of 10 examples are 11 and not 12.
        left = max(1, round(train.epochs * num)) if train.max_steps is None else None
        epochs: list[Int64[np.ndarray, " windows_plus_1"]] = []
        num_steps = 0
        while left != 0 and (train.max_steps is None or num_steps < train.max_steps):
            if len(epochs) == most:
                raise _too_long(train, f"more than {most:,} passes over the {num:,} examples")
            take = num if left is None else min(left, num)
            if self._global_tokens is None and take == num and epochs:
                starts = epochs[0]  # every full epoch is cut alike
            else:
                starts = self._cut_epoch(len(epochs), take)
            epochs.append(starts)
            num_steps += len(starts) - 1
            left = None if left is None else left - take
        return epochs

    def _cut_epoch(self, epoch: int, num: int) -> Int64[np.ndarray, " windows_plus_1"]:
        if self._global_tokens is None:
            starts = np.arange(0, num, self._global_examples, dtype=np.int64)
            return np.append(starts, np.int64(num))
        ends = np.cumsum(self._counts.num_tokens[self.epoch_order(epoch)[:num]], dtype=np.int64)
        starts, before = [0], 0
        while starts[-1] < num:
            stop = int(np.searchsorted(ends, before + self._global_tokens, side="right"))
            stop = max(stop, starts[-1] + 1)  # an example over the budget is a window of its own
            starts.append(stop)
            before = int(ends[stop - 1])
        return np.array(starts, dtype=np.int64)

    def _mixture(self, epoch: int, counts: Sequence[int]) -> Int64[np.ndarray, " examples"]:
        """Example numbers of an epoch of a weighted mix, source by source, not yet shuffled.

        A source gives whole passes first and then a part of itself. Parts of successive epochs follow each
        other around one fixed shuffled circle, so that over the run each example comes equally often (give
        or take one).
        """
        picks: list[Int64[np.ndarray, " picks"]] = []
        for source, count in enumerate(counts):
            members = np.flatnonzero(self._counts.source_ids == source)
            if count == 0:
                continue
            passes, part = divmod(count, len(members))
            # Epochs count from 0, so keys from the top never meet an epoch's own.
            circle = order(self._seed, 2**64 - 1 - source, len(members))
            around = (epoch * part + np.arange(part)) % len(members)
            picks += [members] * passes + [members[circle[around]]]
        return np.concatenate(picks)


def _too_long(train: TrainConfig, what: str) -> ConfigError:
    key, value = ("epochs", train.epochs) if train.max_steps is None else ("max_steps", train.max_steps)
    return ConfigError(
        Problem(f"train.{key}", f"is {value:,}: {what}, which cannot be planned", "Set it lower.")
    )


def plan_windows(
    counts: ExampleCounts,
    data: DataConfig,
    batch: BatchConfig,
    train: TrainConfig,
    world_size: int,
    packed: bool,
    cost: CostModel | None = None,
    sharing: int = 1,
    prefixes: Prefixes | None = None,
) -> WindowPlan:
    """Plan every window of a run.

    Windows hold `batch.global_examples` examples, or as many as `batch.global_tokens` tokens have room
    for (at least one). They end where an epoch ends. The run ends after `train.max_steps` steps where
    that is given, passing over the data as often as it takes, else after `train.epochs`. With
    `data.mix: weighted` an epoch has as many examples as all sources together, each source its share.

    Args:
        counts: Numbers of the training examples (`ExampleStore` has them).
        data, batch, train: The config's sections.
        world_size: Data-parallel ranks.
        packed: Whether documents are packed end to end; as the model's capability check says.
        cost: What to balance over ranks; `ModelShape.cost_model` knows better than the default.
        sharing: So many consecutive ranks take the same cut (they share its sequences): a window's cuts
            are those of `world_size * sharing` ranks.
        prefixes: Beginnings that examples of a micro-batch are to share; None where nothing is shared.

    Raises:
        DataError: There is no example, or a weighted source has none.
        ConfigError: An example is longer than a forward may be, or the run than can be planned.
    """
    if len(counts.num_tokens) == 0:
        raise DataError(Problem("data.train", "there is no example to train on", _LOOK))
    cost = cost or CostModel()
    return WindowPlan(counts, data, batch, train, world_size, packed, cost, sharing, prefixes)


def eval_cuts(
    counts: ExampleCounts,
    batch: BatchConfig,
    world_size: int,
    packed: bool,
    cost: CostModel | None = None,
    sharing: int = 1,
) -> Cuts:
    """Cut all examples among ranks for evaluation, each exactly once, the tail included.

    Every rank has the same number of micro-batches; some may be empty (stand-ins). `cuts[rank][m]` are
    example numbers. No examples give one empty micro-batch on every rank. `sharing` is as for `plan_windows`.
    """
    lengths = counts.num_tokens.astype(np.int64)
    budget = micro_budget(batch, int(lengths.max(initial=1)))
    cuts = pack_window(lengths, world_size, budget, cost or CostModel(), packed)
    return [cut for cut in cuts for _ in range(sharing)]


def _source_shares(counts: ExampleCounts, data: DataConfig) -> list[int] | None:
    """Examples of each source in an epoch of a weighted mix; None for a plain concatenation."""
    if data.mix == "concat":
        return None
    sizes = np.bincount(counts.source_ids, minlength=len(data.train))
    if len(sizes) != len(data.train):
        raise ValueError(f"{len(data.train)} sources in the config, {len(sizes)} in the data")
    empty = [source.path for source, size in zip(data.train, sizes, strict=True) if size == 0]
    if empty:
        cure = "Lower data.eval_fraction, which holds out all of it." if data.eval_fraction else _LOOK
        raise DataError(
            *(Problem("data.train", f"{path} has a weight but no usable example", cure) for path in empty)
        )
    return shares([source.weight for source in data.train], int(sizes.sum()))
