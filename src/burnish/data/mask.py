"""Tokens and their weights, born together: a conversation becomes an `Example`.

    text      <|user|>Hi<|end|>\n<|assistant|>Hello!<|end|>\n
    spans                                    [-----------)
    tokens    |<|user|>|Hi|<|end|>|\n|<|assistant|>|Hello|!|<|end|>|\n|
    weights    0        0  0       0  0             1     1 1       0

The text is rendered once (`render.py`), as a whole, and tokenised once, as a whole; a token is trained
on if it holds at least one character that the model has to write. So a token that straddles a border,
half header or white space and half answer, is trained on: the model cannot write its half in any other
way. Nothing is ever tokenised apart, and no text is rendered in part.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jaxtyping import Float32, Int32
from tokenizers import Tokenizer

from burnish.config.schema import DataConfig
from burnish.data import stamp
from burnish.data.control import Aliased, ControlTokens
from burnish.data.fit import (
    Encoded,
    example_of,
    halves,
    num_supervised,
    token_pieces,
    truncated,
    without_idle,
)
from burnish.data.problems import RowProblem, shorten
from burnish.data.render import ChatRenderer, Span
from burnish.data.tiling import TextTokenizer
from burnish.data.weights import token_weights
from burnish.errors import DataError, Problem
from burnish.records import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Job:
    """A text that waits for the tokenizer."""

    index: int
    conversation: Conversation
    text: str
    spans: Sequence[tuple[int, int, float]]
    """(start, end, weight); later ones win."""
    aliased: Aliased | None
    """Set where control tokens were typed and are kept apart."""
    is_plain: bool = False
    """Text without a template: special tokens are put around it here."""
    num_typed: int = 0
    warnings: tuple[str, ...] = ()


class Encoder:
    """Turns conversations into examples. Picklable: another process builds its own from the same parts.

    Args:
        tokenizer: A fast tokenizer.
        template: The chat template's text; None is enough for plain text and ready-made tokens.
        data: Its `max_tokens`, `too_long`, `train_on` and `control_tokens` are obeyed.
        today: The date that templates stamp; by default that of `SOURCE_DATE_EPOCH`, or today's, the
            same for all rows and all worker processes.

    Raises:
        DataError: The template is not Jinja, or the tokenizer not a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        data: DataConfig,
        today: datetime.date | None = None,
    ) -> None:
        self.today = today or stamp.today()
        self._parts = (tokenizer, template, data, self.today)
        self._data = data
        backend = tokenizer.backend_tokenizer
        if not isinstance(backend, Tokenizer):
            what = "not a fast tokenizer, so tokens cannot be traced to characters"
            raise DataError(Problem("model.tokenizer", what, "Give one that has a tokenizer.json."))
        self._backend = _without_post_processor(backend)
        self._texts = TextTokenizer(self._backend)
        self._control = ControlTokens(self._backend)
        self._bos, self._eos = _special_tokens_around(tokenizer)
        self._num_embeddings = max(len(tokenizer), backend.get_vocab_size())
        self._renderer: ChatRenderer | None = None
        if template is not None:
            special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
            try:
                self._renderer = ChatRenderer(template, special, self._control.names, self.today)
            except jinja2.TemplateSyntaxError as error:
                what = f"the template is not Jinja: line {error.lineno}: {error.message}"
                raise DataError(Problem("data.chat_template", what, "Mend the template.")) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, self._parts

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Encode a batch; a few hundred at a time are fastest.

        Returns:
            At least one `Encoded` per conversation, in order; more where `too_long: split` cut one.

        Raises:
            DataError: There is no template, but a conversation with messages.
        """
        jobs: list[_Job] = []
        done: list[Encoded] = []
        for i, conversation in enumerate(conversations):
            try:
                if conversation.token_ids is not None:
                    done += self._fit(i, conversation, *self._given_tokens(conversation))
                else:
                    jobs.append(self._job(i, conversation))
            except RowProblem as problem:
                done.append(Encoded(i, None, problem))
        done += [e for job, ids, weights in self._tokenise(jobs) for e in self._finish(job, ids, weights)]
        return sorted(done, key=lambda encoded: encoded.index)

    # -- from a conversation to a text with weighted spans ------------------------------------------

    def _job(self, index: int, conversation: Conversation) -> _Job:
        if conversation.messages is None:
            return self._text_job(index, conversation)
        if self._renderer is None:
            raise DataError(
                Problem(
                    "data.chat_template",
                    f"{conversation.row}: the tokenizer has no chat template to write messages with",
                    "Set data.chat_template to a file or a built-in name, such as chatml.",
                )
            )
        messages, tools, arguments = conversation.messages, conversation.tools, conversation.template_kwargs
        num_typed = self._num_typed(conversation)
        hidden = num_typed > 0 and self._data.control_tokens == "escape"
        if hidden:
            messages = [self._hide_in(message) for message in messages]
            tools, arguments = self._control.hide(tools), self._control.hide(arguments)
        chat = self._renderer.render(messages, tools, arguments)
        _check_unicode(chat.text)
        aliased = self._control.alias(chat.text) if hidden else None
        spans = _weighted_spans(chat.spans, chat.pieces, messages, self._data.train_on, len(chat.text))
        return _Job(
            index, conversation, chat.text, spans, aliased, num_typed=num_typed, warnings=tuple(chat.warnings)
        )

    def _text_job(self, index: int, conversation: Conversation) -> _Job:
        text = conversation.text or ""
        _check_unicode(text)
        num_typed = self._control.count(text)
        self._refuse_typed(num_typed)
        aliased = None
        if num_typed and self._data.control_tokens == "escape":
            text = self._control.hide(text)
            aliased = self._control.alias(text)
        return _Job(
            index, conversation, text, [(0, len(text), 1.0)], aliased, is_plain=True, num_typed=num_typed
        )

    def _num_typed(self, conversation: Conversation) -> int:
        count = self._control.count
        typed = 0
        for message in conversation.messages or ():
            answers = message.role == "assistant"
            typed += (self._control.count_in_answer if answers else count)(message.content)
            if message.extra:
                typed += count(message.extra)
        if conversation.tools:
            typed += count(conversation.tools)
        if conversation.template_kwargs:
            typed += count(conversation.template_kwargs)
        self._refuse_typed(typed)
        return typed

    def _refuse_typed(self, typed: int) -> None:
        if typed and self._data.control_tokens == "error":
            raise RowProblem("control_tokens", f"{typed} control tokens are spelled out in its texts")

    def _hide_in(self, message: Message) -> Message:
        hide = self._control.hide_in_answer if message.role == "assistant" else self._control.hide
        return replace(message, content=hide(message.content), extra=self._control.hide(message.extra))

    # -- from texts to tokens -----------------------------------------------------------------------

    def _tokenise(
        self, jobs: Sequence[_Job]
    ) -> list[tuple[_Job, Int32[np.ndarray, " tokens"], Float32[np.ndarray, " tokens"]]]:
        fast = [job for job in jobs if job.aliased is None]
        slow = [job for job in jobs if job.aliased is not None]
        weighted = self._texts.encode([job.text for job in fast], [job.spans for job in fast])
        tokenised = [(job, ids, weights) for job, (ids, weights) in zip(fast, weighted, strict=True)]
        texts = [job.aliased.text for job in slow if job.aliased]
        for job, (ids, e) in zip(slow, self._control.encode(texts) if slow else [], strict=True):
            assert job.aliased is not None
            spans = [(job.aliased.position(a), job.aliased.position(b), w) for a, b, w in job.spans]
            tokenised.append((job, ids, token_weights(e, spans)))
        return [
            (job, *self._surrounded(ids, weights)) if job.is_plain else (job, ids, weights)
            for job, ids, weights in tokenised
        ]

    def _surrounded(
        self, ids: Int32[np.ndarray, " tokens"], weights: Float32[np.ndarray, " tokens"]
    ) -> tuple[Int32[np.ndarray, " longer"], Float32[np.ndarray, " longer"]]:
        """Plain text with the tokenizer's BOS, if it puts one, and one EOS, which is trained on. A text that
        brings them itself (`control_tokens: allow`) gets no second one."""
        has_bos = tuple(ids[: len(self._bos)]) == self._bos
        has_eos = len(ids) > 0 and ids[-1] == self._eos
        before = [] if has_bos else list(self._bos)
        after = [] if has_eos or self._eos is None else [self._eos]
        return (
            np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)]),
            np.concatenate([np.zeros(len(before), np.float32), weights, np.ones(len(after), np.float32)]),
        )

    def _given_tokens(
        self, conversation: Conversation
    ) -> tuple[Int32[np.ndarray, " tokens"], Float32[np.ndarray, " tokens"]]:
        ids = conversation.token_ids or ()
        # Looked at before they become an array: an integer of a file may be too large for any.
        if max(ids, default=0) >= self._num_embeddings or min(ids, default=0) < 0:
            beyond = next(i for i in ids if not 0 <= i < self._num_embeddings)
            raise RowProblem(
                "token_out_of_range",
                f"token {shorten(beyond)} is beyond the vocabulary of {self._num_embeddings} tokens",
            )
        given = np.asarray(ids, np.int32)
        if conversation.token_weights is None:
            return given, np.ones(len(given), np.float32)
        return given, np.asarray(conversation.token_weights, np.float32)

    # -- from tokens to examples that fit -----------------------------------------------------------

    def _finish(
        self, job: _Job, ids: Int32[np.ndarray, " tokens"], weights: Float32[np.ndarray, " tokens"]
    ) -> list[Encoded]:
        around = [*self._bos, *(() if self._eos is None else (self._eos,))] if job.is_plain else []
        if job.aliased is not None and self._control.num_control(ids) != (
            job.aliased.num_real + self._control.num_control(np.array(around, np.int32))
        ):
            what = "the tokenizer makes a control token of ordinary letters, so they cannot be escaped"
            return [Encoded(job.index, None, RowProblem("control_tokens", what))]
        fitted = self._fit(job.index, job.conversation, ids, weights)
        if not job.num_typed and not job.warnings:
            return fitted
        # Typed control tokens are counted once, with the first part of a conversation that was split.
        counts = [job.num_typed, *(0 for _ in fitted[1:])]
        return [
            replace(part, num_control_tokens_typed=num, warnings=job.warnings)
            for part, num in zip(fitted, counts, strict=True)
        ]

    def _fit(
        self,
        index: int,
        conversation: Conversation,
        ids: Int32[np.ndarray, " tokens"],
        weights: Float32[np.ndarray, " tokens"],
    ) -> list[Encoded]:
        """The example as it is, or cut as `data.too_long` says, or what is wrong with it."""
        limit = self._data.max_tokens
        supervised = num_supervised(weights)
        if not supervised:
            return [Encoded(index, None, RowProblem("no_supervised_tokens"), (), len(ids))]
        if len(ids) <= limit:
            return [example_of(index, conversation, ids, weights)]
        if self._data.too_long in ("drop", "error"):
            what = f"{len(ids)} tokens, data.max_tokens is {limit}"
            return [Encoded(index, None, RowProblem("too_long", what), (), len(ids), supervised)]
        if self._data.too_long == "split":
            parts = self._split(index, conversation, ids, weights)
            if parts:
                return parts
        return [truncated(index, conversation, ids, weights, limit)]

    def _split(
        self,
        index: int,
        conversation: Conversation,
        ids: Int32[np.ndarray, " tokens"],
        weights: Float32[np.ndarray, " tokens"],
    ) -> list[Encoded]:
        """Parts that fit, or that are one exchange and cannot be split further.

        Messages are split before a user's turn, every part gets the system turn again, and each is a
        conversation of its own: rendered, proved and tokenised as one. Text and tokens are cut by length.
        """
        if conversation.messages is None:
            return token_pieces(index, conversation, ids, weights, self._data.max_tokens)
        two = halves(conversation, self._data.train_on)
        if two is None:
            return []
        # Each half is encoded like any conversation, and splits itself again where it must.
        return without_idle([replace(part, index=index) for part in self.encode(two)])


def _weighted_spans(
    spans: Sequence[Span],
    pieces: Sequence[tuple[int, int, int]],
    messages: Sequence[Message],
    train_on: str,
    length: int,
) -> list[tuple[int, int, float]]:
    """Spans with the weights that `data.train_on` and the messages themselves say."""
    if train_on == "all":
        whole = [(0, length, 1.0)]
        own = [(a, b, _own_weight(messages[m])) for a, b, m in pieces if m >= 0]
        return whole + [span for span in own if span[2] != 1.0]
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    weighted = []
    for span in spans:
        message = messages[span.message]
        if train_on == "last_assistant" and span.message != last and message.train is not True:
            continue
        weight = _own_weight(message)
        if weight > 0:
            weighted.append((span.start, span.end, weight))
    return weighted


def _own_weight(message: Message) -> float:
    return 0.0 if message.train is False else float(message.weight)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem("lone_surrogate", f"{text[error.start]!r} in a text") from error


def _without_post_processor(backend: Tokenizer) -> Tokenizer:
    """A copy that adds no special tokens and keeps offsets whole.

    Byte-level post-processors trim white space off the offsets, and a token of nothing but white
    space would then hold no character at all and never be trained on.
    """
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return copy


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int | None]:
    """What the tokenizer puts in front of a text (a BOS, if any), and the EOS, if it has one."""
    around = list(tokenizer("a")["input_ids"])  # pyright: ignore[reportArgumentType]
    inside = list(tokenizer("a", add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
    before: tuple[int, ...] = ()
    for start in range(len(around) - len(inside) + 1):
        if around[start : start + len(inside)] == inside:
            before = tuple(around[:start])
            break
    return before, tokenizer.eos_token_id  # pyright: ignore[reportReturnType]
