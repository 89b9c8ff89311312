"""Examples as one self-contained page: no network, nothing of the data can act.

The data travels as JSON inside the page and is put on the screen as text, never as markup, and only for
the examples near the screen, so that hundreds of long ones scroll well. The page's policy allows its own
script and style by their hashes and nothing else: no other script, no image, no connection.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib import resources
from itertools import groupby
from typing import Any

import jinja2
from markupsafe import Markup

from burnish.report.view import View, ViewedExample, summary

TITLE = "What the model sees"


def page(view: View) -> str:
    """The page, as HTML."""
    folder = resources.files("burnish.report")
    style = (folder / "view.css").read_text(encoding="utf-8")
    script = (folder / "view.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((folder / "view.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=TITLE,
        policy=policy,
        # Both are files of ours, without a word of the data.
        style=Markup(style),
        script=Markup(script),
        facts=view.facts,
        numbers=summary(view),
        template=view.template,
        sources=list(dict.fromkeys(one.source for one in (*view.examples, *view.lost))),
        data=_data(view),
    )


def _hash(text: str) -> str:
    """How a content security policy names an inline script or style:
    https://www.w3.org/TR/CSP3/#grammardef-hash-source"""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _data(view: View) -> dict[str, Any]:
    """What the script reads. A token's usual text is written once; where it says something else (part of
    a character), the example has it."""
    texts: dict[int, str] = {}
    for example in view.examples:
        for token_id, text in zip(example.token_ids, example.texts, strict=True):
            texts.setdefault(token_id, text)
    return {
        "texts": texts,
        "control": sorted(view.control_ids & texts.keys()),
        "examples": [_example(example, texts) for example in view.examples],
        "lost": [
            {
                "source": lost.source,
                "row": lost.row,
                "rule": lost.rule,
                "message": lost.message,
                "cure": lost.cure,
                "fate": lost.fate,
                "verdict": lost.verdict,
            }
            for lost in view.lost
        ],
        "microBatches": [list(documents) for documents in view.micro_batches],
        "packed": view.packed,
    }


def _example(example: ViewedExample, texts: dict[int, str]) -> dict[str, Any]:
    pairs = enumerate(zip(example.token_ids, example.texts, strict=True))
    return {
        "source": example.source,
        "row": example.row,
        "ids": example.token_ids,
        "other": {i: text for i, (token_id, text) in pairs if text != texts[token_id]},
        "parts": dict(example.parts),
        "runs": list(_runs(example.weights)),
        "trained": example.num_trained,
        "warnings": example.warnings,
        "cut": [example.num_tokens_cut, example.num_supervised_cut],
        "part": [example.part, example.num_parts],
    }


def _runs(weights: tuple[float, ...]) -> Iterator[tuple[int, int, float]]:
    """Runs of trained tokens of one weight: start, end, weight."""
    start = 0
    for weight, run in groupby(weights):
        end = start + len(list(run))
        if weight > 0:
            yield start, end, weight
        start = end
