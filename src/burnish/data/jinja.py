"""A chat template, compiled so that its one rendering says which message wrote which character.

A template is Jinja: a loop over the messages that writes text. Burnish parses it, and puts at the
start of every loop's body a call that is handed the loop's variable. If that is one of the
conversation's own messages, the call writes one private character into the output: "from here on,
message i is speaking". Another one behind the loop says that it is over. So one rendering gives the
text and the owner of every character in it, whatever the template does to the contents (trimming,
splitting off reasoning, JSON), and without a mark inside any content, which a template could see.

The marks are numbered. Taking them out gives the plain rendering: a call writes text and changes
nothing, so this holds by construction, save where a template captures its own output (a macro,
`{% set %}…{% endset %}`, a filter block) and could look at the marks in it. Such templates are known
when they are compiled, and each of their rows is rendered a second time, plainly, and compared.

The environment is the one that transformers' `apply_chat_template` uses (sandboxed, immutable,
`tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop controls), so that what is
trained on is what a user of the tokenizer gets.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template can raise on a conversation that it does not like."""

NOBODY = -1
"""Owner of text that no message wrote, such as a default system prompt."""

_PLANES = tuple(
    (first, last, re.compile(f"([{chr(first)}-{chr(last)}])"))
    for first, last in ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD))
)
"""Private-use characters that marks are made of; the second plane where a text has such a character
itself, or where there are more marks than the first one holds. (The third plane is control.py's.)"""


@dataclass(frozen=True)
class Rendering:
    """One conversation as text, and who wrote what. Positions are characters of `text`."""

    text: str
    pieces: Sequence[tuple[int, int, int]]
    """(start, end, message index or NOBODY) in order, covering `text`, none empty."""
    generated: Sequence[tuple[int, int]]
    """What stood between `{% generation %}` marks, in order."""


class UnprovedRenderingError(Exception):
    """The owners of the characters cannot be told for this conversation."""


@dataclass
class _Tracker:
    """What the calls inside a template write down during one rendering."""

    first_mark: int = 0
    index: dict[int, int] = field(default_factory=dict)
    """Identity of a message's mapping: its number."""
    events: list[tuple[str, int, int]] = field(default_factory=list)
    """(kind, loop, message); the n-th one is the mark `first_mark + n` in the output."""
    open_loops: set[int] = field(default_factory=set)
    assigned: dict[int, int] = field(default_factory=dict)
    """Loop: message that a `set` took in this turn of it."""
    ambiguous: bool = False

    def start(self, messages: Sequence[Any], first_mark: int) -> None:
        self.first_mark = first_mark
        self.index = {id(message): i for i, message in enumerate(messages)}
        self.events = []
        self.open_loops = set()
        self.assigned = {}
        self.ambiguous = False

    def mark(self, kind: str, loop: int, message: int) -> str:
        self.events.append((kind, loop, message))
        return chr(min(self.first_mark + len(self.events) - 1, 0x10FFFF))

    def enter(self, loop: int, *items: Any) -> str:
        """A turn of a loop begins; `items` are its variables."""
        for item in items:
            message = self.index.get(id(item))
            if message is not None:
                self.open_loops.add(loop)
                return self.mark("enter", loop, message)
        # A loop over numbers: until it takes a message again, nobody speaks.
        return self.leave(loop) if loop in self.assigned else ""

    def assign(self, loop: int, item: Any) -> str:
        """`{% set message = messages[i] %}` in a loop over something else, such as numbers."""
        message = self.index.get(id(item))
        if message is None or (loop in self.open_loops and loop not in self.assigned):
            return ""
        self.ambiguous |= self.assigned.setdefault(loop, message) != message
        self.open_loops.add(loop)
        return self.mark("enter", loop, message)

    def leave(self, loop: int) -> str:
        """The loop is over; whoever spoke before it speaks again."""
        self.assigned.pop(loop, None)
        if loop not in self.open_loops:
            return ""
        self.open_loops.discard(loop)
        return self.mark("leave", loop, NOBODY)

    def generation(self, caller: Any) -> str:
        begin = self.mark("begin", 0, NOBODY)
        body = caller()
        return begin + body + self.mark("end", 0, NOBODY)


class _Generation(Extension):
    """The `{% generation %}` block, with the scoping that transformers gives it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.Call(nodes.Name("burnish_generation", "load"), [], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's namespace without underscored attributes, as transformers has it."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not set {name!r} on a namespace")
        super().__setitem__(name, value)


def _environment(tracker: _Tracker | None, today: datetime.date) -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> str:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(form: str) -> str:
        return datetime.datetime.combine(today, datetime.time()).strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, namespace=_Namespace
    )
    if tracker is None:
        environment.globals["burnish_generation"] = lambda caller: caller()
    else:
        environment.globals["burnish_generation"] = tracker.generation
        environment.filters.update(
            {
                f"burnish_{kind.__name__}": _never_folded(kind)
                for kind in (tracker.enter, tracker.assign, tracker.leave)
            }
        )
    return environment


def _never_folded(call: Callable[..., str]) -> Callable[..., str]:
    """A filter that Jinja does not work out while it compiles, although its argument is a constant."""

    @jinja2.pass_context
    def filtered(_context: Any, loop: int, *items: Any) -> str:
        return call(loop, *items)

    return filtered


def _call(name: str, loop: int, *arguments: nodes.Expr) -> nodes.Output:
    # A filter, because every call of a function goes through the sandbox, which takes longer than the call.
    return nodes.Output([nodes.Filter(nodes.Const(loop), name, list(arguments), [], None, None)])


def _names(target: nodes.Node) -> list[nodes.Expr]:
    return [nodes.Name(n.name, "load") for n in _walk(target) if isinstance(n, nodes.Name)]


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _walk(child)


_STATEMENT_LISTS = ("body", "else_", "elif_")


@dataclass
class _Instrumented:
    num_loops: int = 0
    captures: bool = False
    """A loop or generation mark stands where the template can look at its own output."""


def _instrument(node: nodes.Node, found: _Instrumented, loop: int | None, captured: bool) -> None:
    """Put the calls into every loop below `node` that writes anything.

    Args:
        node: Changed in place.
        found: What was met, changed in place.
        loop: Number of the innermost loop around `node`.
        captured: Whether the output here goes to a variable or a filter.
    """
    is_generation = isinstance(node, nodes.CallBlock) and _is_generation(node)
    if is_generation and captured:
        found.captures = True
    if isinstance(node, nodes.Macro | nodes.FilterBlock | nodes.AssignBlock | nodes.CallBlock):
        captured = captured or not is_generation
    if isinstance(node, nodes.For) and any(isinstance(n, nodes.Output) for n in _walk(node)):
        found.num_loops += 1
        found.captures |= captured
        loop = found.num_loops
        node.body.insert(0, _call("burnish_enter", loop, *_names(node.target)))
    for name, statements in list(node.iter_fields()):
        if name in _STATEMENT_LISTS and isinstance(statements, list):
            setattr(node, name, list(_instrumented(statements, found, loop, captured)))


def _instrumented(
    statements: Iterable[nodes.Node], found: _Instrumented, loop: int | None, captured: bool
) -> Iterator[nodes.Node]:
    for statement in statements:
        before = found.num_loops
        _instrument(statement, found, loop, captured)
        yield statement
        if isinstance(statement, nodes.For) and found.num_loops > before:
            yield _call("burnish_leave", before + 1)
        elif loop is not None and _takes_an_item(statement):
            assert isinstance(statement, nodes.Assign)
            yield _call("burnish_assign", loop, *_names(statement.target))


def _takes_an_item(statement: nodes.Node) -> bool:
    """`{% set name = items[i] %}`"""
    return (
        isinstance(statement, nodes.Assign)
        and isinstance(statement.target, nodes.Name)
        and isinstance(statement.node, nodes.Getitem)
    )


def _is_generation(block: nodes.CallBlock) -> bool:
    return isinstance(block.call.node, nodes.Name) and block.call.node.name == "burnish_generation"


class TrackedTemplate:
    """A compiled template that renders conversations and tells the owner of every character.

    Args:
        source: The Jinja text.
        today: What `strftime_now` gives; one date for all rows.

    Raises:
        jinja2.TemplateSyntaxError: The template is not Jinja.
    """

    def __init__(self, source: str, today: datetime.date) -> None:
        self._tracker = _Tracker()
        plain = _environment(None, today)
        tracked = _environment(self._tracker, today)
        self._plain = plain.from_string(source)
        tree = tracked.parse(source)
        self.has_generation = any(
            isinstance(n, nodes.CallBlock) and _is_generation(n) for n in tree.find_all(nodes.CallBlock)
        )
        found = _Instrumented()
        _instrument(tree, found, None, captured=False)
        tree.set_environment(tracked)
        tree.set_lineno(1)
        self._tracked = tracked.from_string(tree)
        for template in (self._plain, self._tracked):
            # Every rendering copies them, and Jinja's chain of mappings takes longer to copy than to use.
            template.globals = dict(template.globals)
        self._captures = found.captures

    def plain(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The rendering as anybody else would make it."""
        return self._plain.render(messages=messages, **variables)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Rendering:
        """Render once, with owners.

        Raises:
            UnprovedRenderingError: It cannot be told which message wrote which character.
            TEMPLATE_FAILURES: The template refuses the conversation.
        """
        for first, last, pattern in _PLANES:
            self._tracker.start(messages, first)
            marked = self._tracked.render(messages=messages, **variables)
            if len(self._tracker.events) > last - first + 1:
                continue
            rendering = self._read(marked, pattern)
            if rendering is None:
                continue
            if self._captures and rendering.text != self.plain(messages, variables):
                continue
            return rendering
        raise UnprovedRenderingError("the template changes the order of its output, or looks at it")

    def _read(self, marked: str, mark: re.Pattern[str]) -> Rendering | None:
        """Take the marks out; None if they are not the ones that were written, in their order."""
        tracker = self._tracker
        if tracker.ambiguous:
            raise UnprovedRenderingError("a loop of the template takes two messages at once")
        parts = mark.split(marked)
        marks = [ord(c) - tracker.first_mark for c in parts[1::2]]
        if not self._captures:
            return (
                _assemble(parts[0::2], tracker.events) if marks == list(range(len(tracker.events))) else None
            )
        rising = all(a < b for a, b in itertools.pairwise(marks))
        if not rising or any(m >= len(tracker.events) for m in marks[-1:]):
            return None
        return _assemble(parts[0::2], [tracker.events[m] for m in marks])


def _assemble(texts: Sequence[str], events: Sequence[tuple[str, int, int]]) -> Rendering:
    """Text between marks, and the marks between the texts, to a rendering with owners."""
    pieces: list[tuple[int, int, int]] = []
    generated: list[tuple[int, int]] = []
    speakers: list[tuple[int, int]] = []  # (loop, message), innermost last
    begin = position = 0
    owner = NOBODY
    for i, text in enumerate(texts):
        if i:
            kind, loop, message = events[i - 1]
            if kind == "begin":
                begin = position
            elif kind == "end":
                generated.append((begin, position))
            else:
                for depth, (open_loop, _) in enumerate(speakers):
                    if open_loop == loop:
                        del speakers[depth:]
                        break
                if kind == "enter":
                    speakers.append((loop, message))
                owner = speakers[-1][1] if speakers else NOBODY
        if not text:
            continue
        end = position + len(text)
        if pieces and pieces[-1][2] == owner:
            pieces[-1] = (pieces[-1][0], end, owner)
        else:
            pieces.append((position, end, owner))
        position = end
    return Rendering("".join(texts), pieces, generated)
