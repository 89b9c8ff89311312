"""Examples as the model will see them: some rows of every source, on their way to tokens and masks.

Only the rows that are shown are encoded, so that a look takes seconds whatever the size of the data.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np

from burnish.config.row_rules import RULES
from burnish.config.schema import Config, SourceConfig
from burnish.data.control import ControlTokens
from burnish.data.format import RowFormat, detect_format, to_conversation
from burnish.data.load import Row, read_rows, source_names
from burnish.data.mask import Encoded, Encoder
from burnish.data.pack import pack_window
from burnish.data.policies import fate, resolve_policies
from burnish.data.prepare import PEEK_ROWS
from burnish.data.problems import RowProblem
from burnish.data.stamp import date_of_run
from burnish.data.texts import Mender
from burnish.data.tokenizer import load_tokenizer
from burnish.data.windows import micro_budget
from burnish.errors import ConfigError, DataError, Problem, counted, writing
from burnish.plan import CostModel
from burnish.records import Conversation, Example
from burnish.report.view import LostRow, View, ViewedExample, json_line
from burnish.report.view_tokens import TokenReader

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

SPAN_ROWS = 2_000
"""Rows of a source among which those to show are chosen, evenly: the first ones, more only where more
examples are asked for. Reading a large file to its end takes longer than anybody waits for a look."""
NUM_ROUNDS = 4
"""How often more rows are taken where some of those taken gave no example."""
NUM_EXAMPLES = 10
"""Shown unless asked otherwise: in the terminal and as JSON …"""
NUM_EXAMPLES_PAGE = 50
"""… and on a page."""

_GENERATION = re.compile(r"\{%-?\s*generation\b")


def view(
    config: Config,
    console: Console,
    num_examples: int | None = None,
    html: Path | None = None,
    as_json: bool = False,
    source: str | None = None,
    row: str | None = None,
    aside: Console | None = None,
) -> Sequence[LostRow]:
    """Show examples on the console, as lines of JSON, or as a page.

    Args:
        config: The run's config.
        console: Where to; with `as_json` its file alone.
        num_examples: About how many examples; None takes the default.
        html: Write the page there.
        as_json: One line per example, nothing else.
        source: Only this source, of training or evaluation.
        row: Only this row: its place (`train.jsonl:12`) or the end of that (`12`).
        aside: Where verdicts on rows without an example go when JSON or a page is written (stderr).

    Returns:
        Rows that were looked at and gave no example.

    Raises:
        ConfigError: There is no such source or row.
        DataError: No tokenizer, no readable file, or not one example to show.
        MachineError: The page cannot be written.
    """
    if num_examples is None:
        num_examples = NUM_EXAMPLES if html is None else NUM_EXAMPLES_PAGE
    from burnish.report.view_terminal import print_verdicts, show

    gathered = gather(config, num_examples, source, row)
    if html is not None:
        from burnish.report.view_html import page

        text = page(gathered)
        with writing(html):
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(text, encoding="utf-8")
    if as_json:
        for example in gathered.examples:
            console.file.write(json_line(example) + "\n")
    elif html is None:
        if isinstance(console.file, io.TextIOWrapper):
            # A terminal that cannot write a letter gets its number, not a traceback.
            console.file.reconfigure(errors="backslashreplace")
        show(gathered, console)
    if aside is not None and gathered.lost and (as_json or html is not None):
        print_verdicts(gathered.lost, aside)
    return gathered.lost


def gather(config: Config, num_examples: int, source: str | None = None, row: str | None = None) -> View:
    """Encode some rows of every source, as many of each as there are, evenly spread.

    Args, errors: as in `view`.
    """
    if num_examples < 1:
        raise ConfigError(Problem("-n", f"{num_examples} examples cannot be shown", "Give 1 or more."))
    tokenizer, template = load_tokenizer(config.model, config.data)
    encoder = Encoder(tokenizer, template, config.data, date_of_run(config))
    span = max(SPAN_ROWS, num_examples)
    piles = [_Pile(name, origin, encoder, config, span, row) for name, origin in _chosen(config, source)]
    if row is not None and not any(pile.num_left for pile in piles):
        raise ConfigError(
            Problem("--row", f"there is no row {row!r}", "Give it as `file:line`, or the line.")
        )
    _take(piles, num_examples)
    lost = [loss for pile in piles for loss in pile.lost()]
    examples, control_ids = _viewed(piles, tokenizer)
    if not examples:
        raise DataError(*_nothing_to_show(lost), heading="")
    packed = config.data.packing != "off"
    lengths = np.array([len(example.token_ids) for example in examples], np.int64)
    cuts = pack_window(lengths, 1, micro_budget(config.batch, config.data.max_tokens), CostModel(), packed)[0]
    return View(
        facts=_facts(config, tokenizer, template, lost),
        template=template,
        control_ids=control_ids,
        examples=examples,
        lost=lost,
        micro_batches=[sorted(int(i) for i in cut) for cut in cuts],
        packed=packed,
    )


def _chosen(config: Config, wanted: str | None) -> list[tuple[str, SourceConfig]]:
    train = list(zip(source_names(config.data.train), config.data.train, strict=True))
    if wanted is None:
        return train
    held_out = config.data.eval or ()
    every = train + list(zip(source_names(held_out), held_out, strict=True))
    found = [(name, source) for name, source in every if wanted in (name, source.path)]
    if not found:
        names = ", ".join(name for name, _ in every)
        raise ConfigError(Problem("--source", f"there is no source {wanted!r}", f"There are: {names}."))
    return found[:1]


@dataclass(frozen=True)
class _Shown:
    """What became of one row."""

    encoded: Sequence[Encoded]
    conversation: Conversation | None
    warnings: tuple[str, ...] = ()


@final
class _Pile:
    """The rows of one source among which some are taken, and what became of those."""

    def __init__(
        self,
        name: str,
        source: SourceConfig,
        encoder: Encoder,
        config: Config,
        num_rows: int,
        wanted: str | None,
    ) -> None:
        self.name = name
        self._encoder = encoder
        self._data = config.data
        self._policies = resolve_policies(config.data)
        rows = read_rows(source, name=name)
        first = list(itertools.islice(rows, PEEK_ROWS))
        readable = [row.value for row in first if row.value is not None]
        if not first:
            raise DataError(Problem(source.path, "there are no rows in it", "Is it the right file?"))
        # Where no row can be read there is no format either, and none is asked for: each row is a loss.
        self._format = detect_format(source, readable) if readable else RowFormat("messages", {})
        every = itertools.chain(first, rows)
        self._rows = _only(every, wanted) if wanted else list(itertools.islice(every, num_rows))
        self._left = list(range(len(self._rows)))
        self._shown: dict[int, _Shown] = {}

    @property
    def control_policy(self) -> str:
        """`data.control_tokens`."""
        return self._data.control_tokens

    @property
    def num_left(self) -> int:
        """Rows that were not taken."""
        return len(self._left)

    def take(self, num_rows: int) -> int:
        """Encode so many rows, evenly spread over those left; how many of them gave an example."""
        picked = [self._left[i * len(self._left) // num_rows] for i in range(num_rows)]
        taken = set(picked)
        self._left = [i for i in self._left if i not in taken]
        conversations: list[Conversation] = []
        positions: list[int] = []
        mended: dict[int, tuple[str, ...]] = {}
        for i in picked:
            mender = Mender(self._policies)
            try:
                conversations.append(to_conversation(self._rows[i], self._format, mender))
            except RowProblem as problem:
                self._shown[i] = _Shown([Encoded(0, None, problem)], None)
                continue
            positions.append(i)
            mended[i] = tuple(dict.fromkeys(f"mended: {fix.message} [{fix.rule}]" for fix in mender.fixed))
        encoded = self._encoder.encode(conversations)
        for index, parts in itertools.groupby(encoded, key=lambda one: one.index):
            i = positions[index]
            self._shown[i] = _Shown(list(parts), conversations[index], mended[i])
        return sum(any(one.example for one in self._shown[i].encoded) for i in picked)

    def examples(self) -> Iterator[tuple[_Shown, Encoded, int, int]]:
        """Every part of every row that gave one, with its number and the number of parts."""
        for i in sorted(self._shown):
            kept = [one for one in self._shown[i].encoded if one.example is not None]
            for number, one in enumerate(kept, 1):
                yield self._shown[i], one, number, len(kept)

    def lost(self) -> Iterator[LostRow]:
        """The rows that gave no example, in order."""
        for i in sorted(self._shown):
            for one in self._shown[i].encoded:
                if one.problem is not None:
                    rule = one.problem.rule
                    policy = fate(rule, self._policies, self._data)
                    place = self._rows[i].place
                    yield LostRow(self.name, place, rule, one.problem.message, RULES[rule].cure, policy)


def _only(rows: Iterable[Row], wanted: str) -> list[Row]:
    """The first row of this place, wherever in its source."""
    matching = (
        row for row in rows if row.place == wanted or row.place.endswith((f":{wanted}", f"#{wanted}"))
    )
    return list(itertools.islice(matching, 1))


def _take(piles: Sequence[_Pile], num_examples: int) -> None:
    """Take rows from all piles alike, and others in the place of those that gave nothing."""
    missing = num_examples
    for _ in range(NUM_ROUNDS):
        for pile, quota in zip(piles, _quotas([pile.num_left for pile in piles], missing), strict=True):
            if quota:
                missing -= pile.take(quota)
        if missing <= 0:
            return


def _quotas(left: Sequence[int], wanted: int) -> list[int]:
    """As many of each as of any other, as far as they go."""
    quotas = [0] * len(left)
    while wanted > 0 and any(q < n for q, n in zip(quotas, left, strict=True)):
        for i, num_left in enumerate(left):
            if wanted > 0 and quotas[i] < num_left:
                quotas[i] += 1
                wanted -= 1
    return quotas


def _viewed(
    piles: Sequence[_Pile], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[ViewedExample], frozenset[int]]:
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    control_ids = frozenset(backend.token_to_id(name) for name in ControlTokens(backend).names)
    reader = TokenReader(backend, control_ids)
    viewed = []
    for pile in piles:
        for shown, one, part, num_parts in pile.examples():
            assert one.example is not None
            plain = _viewed_tokens(one.example, reader)
            viewed.append(
                replace(
                    plain,
                    warnings=(*shown.warnings, *one.warnings, *_notes(one, pile.control_policy)),
                    num_tokens_cut=one.num_tokens_cut,
                    num_supervised_cut=one.num_supervised_cut,
                    part=part,
                    num_parts=num_parts,
                )
            )
    return viewed, control_ids


def _viewed_tokens(example: Example, reader: TokenReader) -> ViewedExample:
    ids = [int(i) for i in example.token_ids]
    said = reader.read(ids)
    # float32 prints its digits; as a float it would print those of its binary neighbour.
    weights = (
        float(str(w)) if trained else 0.0 for w, trained in zip(example.weights, example.trained, strict=True)
    )
    return ViewedExample(example.source, example.row, tuple(ids), said.texts, tuple(weights), said.parts)


def _notes(encoded: Encoded, control_policy: str) -> Iterator[str]:
    """What a reader should know of an example that the encoder does not say in words."""
    if encoded.num_tokens_cut:
        lost = f"{encoded.num_supervised_cut:,} of them to be learned"
        yield f"cut at data.max_tokens: {encoded.num_tokens_cut:,} tokens are left out, {lost}"
    if encoded.num_control_tokens_typed:
        became = "kept as plain text" if control_policy == "escape" else "taken for real ones"
        yield f"control tokens typed in its texts: {encoded.num_control_tokens_typed:,}, {became}"


def _facts(
    config: Config, tokenizer: PreTrainedTokenizerBase, template: str | None, lost: Sequence[LostRow]
) -> dict[str, str]:
    data, model = config.data, config.model
    named = data.chat_template or "the tokenizer's own"
    return {
        "model": model.path,
        "tokenizer": f"{model.tokenizer or model.path} ({len(tokenizer):,} tokens)",
        "template": named if template is not None else "none",
        "mask": _mask(template, lost),
        "trains on": data.train_on,
        "longest example": f"{data.max_tokens:,} tokens, longer ones: {data.too_long}",
    }


def _mask(template: str | None, lost: Sequence[LostRow]) -> str:
    unproved = sum(loss.rule == "mask_unproved" for loss in lost)
    if template is None:
        return "no template: texts and ready-made tokens only"
    how = "marked by the template" if _GENERATION.search(template) else "proved from the rendering"
    return f"{how}, for every row shown" + (f"; NOT PROVED for {unproved} others" if unproved else "")


def _nothing_to_show(lost: Sequence[LostRow]) -> Iterator[Problem]:
    what = f"none of the {counted(len(lost), 'row')} looked at gives an example"
    yield Problem(
        "data.train", what, "Mend them, or say with format and columns of the source what they are."
    )
    for loss in lost[:10]:
        yield Problem(loss.row, f"{loss.message} [{loss.rule}]", loss.cure)
