"""docs/parity.md: the prose stays as it was written, what is between marks is made from a result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDTH = 96


def write_page(page: Path, result: Mapping[str, Any]) -> None:
    """Fill in every block of the page that the result has something for.

    A block stands between `<!-- made: NAME -->` and `<!-- end -->`; others stay as they are.
    """
    blocks = make_blocks(result)
    text = page.read_text("utf-8")

    def fill(match: re.Match[str]) -> str:
        if match[1] not in blocks:
            return match[0]
        return f"<!-- made: {match[1]} -->\n\n{blocks[match[1]]}\n\n<!-- end -->"

    page.write_text(re.sub(r"<!-- made: (\S+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL), "utf-8")


def make_blocks(result: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by the block's name."""
    blocks = {f"tokens-{example['key']}": _views(example["views"]) for example in result["examples"]}
    blocks["curves"] = _curves(result)
    blocks["versions"] = _versions(result)
    if result["overrides"]:
        blocks["overrides"] = "\n".join(f"- **{part}**: {what}" for part, what in result["overrides"].items())
    blocks["evaluation"] = _evaluation(result["evaluation"])
    blocks["rates"] = _rates(result["first_rates"])
    if result["windows"]:
        blocks["windows"] = _windows(result["windows"])
    return blocks


def _curves(result: Mapping[str, Any]) -> str:
    lines = [
        "| against | trained | rows | loss, first to last step | largest difference at any step |"
        " final weights apart |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in result["comparisons"]:
        kind, dtype, lengths = c["setting"].split("-")
        rows = {"equal": "equal learned lengths", "mixed": "lengths as they come"}[lengths]
        how = f"{'LoRA' if kind == 'lora' else 'full'}, {dtype}{', its packing' if c['packed'] else ''}"
        gap = f"{c['largest_loss_difference']:.1e}{'' if c['judged'] else ' (not judged)'}"
        curve = f"{c['first_loss']:.3f} to {c['last_loss']:.3f}"
        lines.append(f"| {c['peer']} | {how} | {rows} | {curve} | {gap} | {c['weights_apart']:.1e} |")
    lines += ["", _data_line(result)]
    lines.append(
        f"That the comparison can fail: ours with betas of 0.9 and 0.99 instead of 0.9 and 0.95 is "
        f"{result['control_difference']:.1e} off."
    )
    return "\n".join(lines)


def _data_line(result: Mapping[str, Any]) -> str:
    parts = [
        f"{d['peer']}: {'all' if d['equal'] else 'NOT all'} {d['rows']} rows, {d['tokens']:,} tokens"
        for d in result["data"]
    ]
    return f"Token ids and learned positions equal to ours, up to the last learned token: {'; '.join(parts)}."


def _versions(result: Mapping[str, Any]) -> str:
    sides = {"Burnish": result["ours"], **result["versions"]}
    said = [f"{who}: {', '.join(f'{n} {v}' for n, v in of.items())}" for who, of in sides.items()]
    where = f"{result['date']}, {result['cores']} cores, Python {result['python']}"
    what = (
        f"{result['steps']} steps of 8 examples, rows {result['rows']}, {result['vocabulary']:,} tokens known"
    )
    return f"{where}, {what}. {'; '.join(said)}."


def _views(views: Sequence[Mapping[str, Any]]) -> str:
    lines = ["```text"]
    for view in views:
        for part in _wrapped(list(zip(view["texts"], view["learned"], strict=True))):
            lines += _marked(view["who"], part)
        lines.append("")
    return "\n".join([*lines[:-1], "```"])


def _wrapped(tokens: Sequence[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """Tokens in lines of at most `_WIDTH` letters, each token whole."""
    parts: list[list[tuple[str, bool]]] = [[]]
    width = 0
    for text, learned in tokens:
        shown = _shown(text)
        if width + len(shown) + 1 > _WIDTH and parts[-1]:
            parts.append([])
            width = 0
        parts[-1].append((shown, learned))
        width += len(shown) + 1
    return parts


def _marked(who: str, tokens: Sequence[tuple[str, bool]]) -> list[str]:
    """The tokens, and a line with ^ under those that are learned."""
    texts = "|".join(text for text, _ in tokens)
    marks = " ".join(("^" if learned else " ") * len(text) for text, learned in tokens)
    return [f"{who:9} |{texts}|", f"{'':9}  {marks}".rstrip()]


def _shown(text: str) -> str:
    return text.replace("\n", "\\n")


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "| | it reports | mean over all learned tokens of the same rows and weights | off by |"
    lines = [head, "| --- | --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row['who']} | {row['reported']:.6f} | {row['over_all_tokens']:.6f} | {row['off_by']:+.1e} |"
        )
    return "\n".join(lines)


def _rates(rates: Mapping[str, Sequence[float]]) -> str:
    steps = range(1, len(rates["burnish"]) + 1)
    lines = [f"| step | {' | '.join(map(str, steps))} |", f"| --- |{' --- |' * len(steps)}"]
    names = {"burnish": "Burnish", "cosine_with_min_lr": "`cosine_with_min_lr`"}
    lines += [f"| {names[who]} | {' | '.join(f'{v:.2f}' for v in of)} |" for who, of in rates.items()]
    return "\n".join(lines)


def _windows(w: Mapping[str, Any]) -> str:
    mixed = ", ".join(map(str, w["openrlhf_mixes_epochs"])) or "none"
    return "\n".join(
        [
            f"{w['rows']} rows, {w['per_step']} to a step, {w['epochs']} epochs:",
            "",
            "| | examples of each step | steps that mix two epochs | read, but in no step |",
            "| --- | --- | --- | --- |",
            f"| Burnish | {' '.join(map(str, w['burnish']))} | none | 0 |",
            f"| OpenRLHF | {' '.join(map(str, w['openrlhf']))} | {mixed} | {w['openrlhf_never_learned']} |",
        ]
    )
