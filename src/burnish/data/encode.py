"""A batch of rows becomes a batch of examples and findings: the work that is done in parallel."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import pyarrow as pa
import xxhash
from tokenizers import Tokenizer

from burnish.config.row_rules import Policy
from burnish.data.format import IGNORED_LABEL, RowFormat, to_conversation
from burnish.data.mask import Encoded, Encoder
from burnish.data.messages import ROLES
from burnish.data.problems import RowProblem
from burnish.data.rows import Row
from burnish.data.store import index_batch, tokens_batch
from burnish.data.texts import Mender
from burnish.records import Conversation, Example

ANSWER_COLUMNS = ("completion", "output", "text")
"""Our names of columns whose text is trained on."""


@dataclass(frozen=True)
class Finding:
    """Something about one row that the report names."""

    rule: str
    place: str
    message: str
    fixed: bool
    """True: the row was mended and used. False: it was not used."""
    num_tokens: int = 0
    """Tokens lost with the row: as encoded, or of its texts alone where it never got that far."""
    num_supervised: int = 0
    """Those of them that would have been trained on."""


@dataclass(frozen=True)
class BatchResult:
    """What became of a batch of rows."""

    num_rows: int
    num_kept: int
    """Rows of which at least one example came."""
    tokens: pa.RecordBatch
    index: pa.RecordBatch
    findings: tuple[Finding, ...]
    warnings: tuple[tuple[str, str], ...]
    """What was noticed about an example, and the place of its row."""
    num_control_tokens: int
    """Control tokens that were typed in texts."""


@final
class BatchEncoder:
    """Turns batches of one source's rows into examples and findings. Picklable.

    Args:
        encoder: Conversations to examples.
        backend: Counts the tokens of rows that are lost.
        fmt: The shape of the source's rows.
        policies: Of every rule.
    """

    def __init__(
        self,
        encoder: Encoder,
        backend: Tokenizer,
        fmt: RowFormat,
        policies: Mapping[str, Policy],
    ) -> None:
        self._encoder = encoder
        self._backend = backend
        self._fmt = fmt
        self._policies = dict(policies)

    def __call__(self, rows: Sequence[Row]) -> BatchResult:
        """Encode a batch. Findings and examples are in the order of the rows."""
        findings: list[Finding] = []
        conversations: list[Conversation] = []
        used: list[Row] = []
        for row in rows:
            mender = Mender(self._policies)
            try:
                conversations.append(to_conversation(row, self._fmt, mender))
            except RowProblem as problem:
                findings.append(self._lost(row, problem))
                continue
            used.append(row)
            # A rule is counted once per row, however many of its messages were mended.
            fixed = {problem.rule: problem for problem in reversed(mender.fixed)}
            findings += [Finding(p.rule, row.place, p.message, True) for p in fixed.values()]
        return self._collect(len(rows), used, conversations, findings)

    def _collect(
        self,
        num_rows: int,
        used: Sequence[Row],
        conversations: Sequence[Conversation],
        findings: Sequence[Finding],
    ) -> BatchResult:
        examples: list[Example] = []
        warnings: list[tuple[str, str]] = []
        cuts: list[tuple[int, int]] = []
        hashes: list[int] = []
        pieces: list[int] = []
        lost: dict[tuple[int, str], Finding] = {}
        num_control_tokens, last = 0, -1
        for encoded in self._encoder.encode(conversations):
            num_control_tokens += encoded.num_control_tokens_typed
            if encoded.problem is not None:
                # A row is counted once per rule, however many parts of it were lost where it was split.
                key = encoded.index, encoded.problem.rule
                if key in lost:
                    lost[key] = _with_part(lost[key], encoded)
                else:
                    lost[key] = self._lost(used[encoded.index], encoded.problem, encoded)
            elif encoded.example is not None:
                examples.append(encoded.example)
                warnings += [(text, encoded.example.row) for text in encoded.warnings]
                cuts.append((encoded.num_tokens_cut, encoded.num_supervised_cut))
                hashes.append(row_hash(conversations[encoded.index]))
                pieces.append(pieces[-1] + 1 if encoded.index == last else 0)
                last = encoded.index
        return BatchResult(
            num_rows,
            num_kept=pieces.count(0),
            tokens=tokens_batch(examples),
            index=index_batch(examples, cuts, hashes, pieces),
            findings=(*findings, *lost.values()),
            warnings=tuple(warnings),
            num_control_tokens=num_control_tokens,
        )

    def _lost(self, row: Row, problem: RowProblem, encoded: Encoded | None = None) -> Finding:
        if encoded is not None and encoded.num_tokens_cut:
            num_tokens, num_supervised = encoded.num_tokens_cut, encoded.num_supervised_cut
        elif "input_ids" in self._fmt.columns:
            num_tokens, num_supervised = _given_tokens(row.value or {}, self._fmt)
        else:
            num_tokens = num_supervised = 0
            for text, is_answer in _texts(row.value or {}, self._fmt):
                count = self._count(text)
                num_tokens += count
                num_supervised += count if is_answer else 0
        return Finding(problem.rule, row.place, problem.message, False, num_tokens, num_supervised)

    def _count(self, text: str) -> int:
        clean = text.encode("utf-8", errors="replace").decode("utf-8")
        return len(self._backend.encode(clean, add_special_tokens=False).ids)


def _with_part(finding: Finding, part: Encoded) -> Finding:
    """The finding about a row with one more part of it lost, for the same reason."""
    return replace(
        finding,
        num_tokens=finding.num_tokens + part.num_tokens_cut,
        num_supervised=finding.num_supervised + part.num_supervised_cut,
    )


def _given_tokens(value: Mapping[str, Any], fmt: RowFormat) -> tuple[int, int]:
    """Tokens of a row of ready-made ones that cannot be used, and those of them that would have been trained
    on: all targets but those that labels, mask or weights leave out, as far as these can be read."""
    cells = {ours: _list_in(value.get(theirs)) for ours, theirs in fmt.columns.items()}
    num_tokens = len(cells.pop("input_ids"))
    untrained = {
        place
        for ours, marks in cells.items()
        for place, mark in enumerate(marks)
        if mark == (IGNORED_LABEL if ours == "labels" else 0)
    }
    return num_tokens, sum(place not in untrained for place in range(1, num_tokens))


def _list_in(cell: Any) -> list[Any]:
    """The list that a cell is, or that its JSON text holds; none where it is something else."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return []
    return cell if isinstance(cell, list) else []


def _texts(value: Mapping[str, Any], fmt: RowFormat) -> Iterator[tuple[str, bool]]:
    """The texts of a row in our columns, and whether each would have been trained on."""
    for ours, theirs in fmt.columns.items():
        cell = value.get(theirs)
        if isinstance(cell, str):
            yield cell, ours in ANSWER_COLUMNS
        elif isinstance(cell, list):
            for item in cell:
                if isinstance(item, dict):
                    yield from _message_texts(item)


def _message_texts(message: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    speaker = message.get("role") or message.get("from")
    is_answer = isinstance(speaker, str) and ROLES.get(speaker.lower()) == "assistant"
    for key in ("content", "value"):
        if isinstance(message.get(key), str):
            yield message[key], is_answer


def row_hash(conversation: Conversation) -> int:
    """128 bits that are equal for rows of equal content, wherever they stand and whatever their format.

    What is trained on, and how much, is no part of it: a row that is read by the model in training is no row
    to evaluate on. A prompt of messages is untrained, for one, and the same conversation elsewhere is not.
    """
    if conversation.messages is not None:
        messages = [(m.role, m.content, m.extra) for m in conversation.messages]
        content = repr((messages, conversation.tools, conversation.template_kwargs))
    else:
        content = repr((conversation.text, conversation.token_ids))
    return xxhash.xxh3_128_intdigest(content.encode("utf-8", errors="surrogatepass"))
