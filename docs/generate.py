"""Write the tables in these pages that are made from the code: `python docs/generate.py [TABLE ...]`.

A table stands between `<!-- made by docs/generate.py: NAME -->` and `<!-- end -->`. A test holds that all of
them are current (`tests/docs/test_generated.py`), so that a page and the code change together.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
_PLACE = re.compile(r"(<!-- made by docs/generate\.py: ([a-z_]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def keys() -> str:
    """Every key of the config by section: what it takes, its default, its sentence from the schema."""
    from burnish.config.names import all_keys
    from burnish.config.schema import Config

    sections: dict[str, list[list[str]]] = {}
    for key in all_keys():
        section = key.name.split(".")[0] if "." in key.name else "the run"
        default = "**must be given**" if key.required else f"`{_yaml(key.default)}`"
        sections.setdefault(section, []).append([f"`{key.name}`", _cell(key.takes), default, _cell(key.doc)])
    parts = []
    for section, rows in sections.items():
        field = Config.model_fields.get(section)
        says = "" if field is None else f"{_section_doc(field.annotation)}\n\n"
        parts.append(f"\n## {section}\n\n{says}")
        parts.append(_table(("key", "takes", "default", "what it does"), rows))
    return "".join(parts)


def _section_doc(annotation: Any) -> str:
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and kind is not type(None):
            return (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    return ""


def _yaml(value: Any) -> str:
    """A default as one would write it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    return str(value)


def names() -> str:
    """What other tools call a key, and what has to be said of it."""
    from burnish.config.elsewhere import NAMES_ELSEWHERE, NOTES_ELSEWHERE

    rows = [
        [f"`{name}`", f"`{NAMES_ELSEWHERE[name]}`" if name in NAMES_ELSEWHERE else "", _cell(note)]
        for name in sorted(NAMES_ELSEWHERE.keys() | NOTES_ELSEWHERE.keys())
        for note in [NOTES_ELSEWHERE.get(name, "")]
    ]
    return _table(("theirs", "ours", "what to know"), rows)


def formats() -> str:
    """The shapes of a row, with the columns that are looked for."""
    from burnish.data.format import SHAPES

    def names(columns: Mapping[str, Sequence[str]], form: str) -> Iterator[str]:
        for ours, theirs in columns.items():
            if theirs:
                others = ", ".join(name for name in theirs if name != ours)
                yield form.format(f"{ours} ({others})" if others else ours)

    rows = [
        [f"`{name}`", "; ".join([*names(shape.required, "{}"), *names(shape.optional, "[{}]")])]
        for name, shape in SHAPES.items()
    ]
    return _table(("format", "columns (other names for them)"), rows)


def rules() -> str:
    """Every rule that a bad row can break."""
    from burnish.config.row_rules import RULES

    rows = [
        [f"`{r.name}`", _cell(r.what), r.default or "*bad_rows*", _cell(r.fix) or "-", _cell(r.cure)]
        for r in RULES.values()
    ]
    return _table(("rule", "what is wrong", "policy", "what `fix` does", "cure"), rows)


def templates() -> str:
    """The comparison of `tests/data/test_twins.py`, counted per family."""
    sys.path.insert(0, str(DOCS.parent / "tests" / "data"))
    import test_twins as twins

    from burnish.data.tokenizer import builtin_templates

    rows = []
    for file in sorted(twins._FOLDER.glob("*.jinja")):
        name, source = file.stem, file.read_text("utf-8")
        if name.endswith("_training"):
            continue
        equal = other = "no twin"
        if name in twins._PAIRS:
            twin = (file.parent / f"{name}_training.jinja").read_text("utf-8")
            seen = Counter(twins._compare(name, source, twin, shape) for shape in twins._SHAPES)
            equal, other = str(seen["equal"]), str(sum(seen.values()) - seen["equal"])
        rows.append([f"`{name}`", str(_num_encoded(twins, source)), equal, other])
    builtin = ", ".join(f"`{name}`" for name in builtin_templates())
    version, num = importlib.metadata.version("trl"), len(twins._SHAPES)
    table = _table(("template", "encoded", "equal", "not comparable"), rows)
    return (
        f"Made with trl {version}, {num} conversations each.\n\n{table}\n"
        f"Built-in templates, set by `data.chat_template: NAME`: {builtin}.\n"
    )


def _num_encoded(twins: Any, source: str) -> int:
    """Conversations with a proved mask.

    Raises:
        AssertionError: One is refused for want of a proof and not by the template.
    """
    _, encoder = twins._encoder(source, source)
    num = 0
    for shape, messages in twins._SHAPES.items():
        tools = twins._TOOLS if "tool" in shape else None
        [encoded] = encoder.encode([twins._conversation(messages, tools)])
        assert encoded.problem is None or encoded.problem.rule == "template_error", (shape, encoded.problem)
        num += encoded.example is not None
    return num


def exit_codes() -> str:
    """The exit codes, with the errors that end in them."""
    from burnish import errors

    says = {
        "EXIT_DONE": "done",
        "EXIT_CONFIG": "the config is wrong; every problem is listed",
        "EXIT_DATA": "data, template or tokenizer cannot be trained on; rows are named by `file:line`",
        "EXIT_ENVIRONMENT": "the machine lacks something, or a checkpoint is damaged or another run's",
        "EXIT_STOPPED_ITSELF": "training stopped itself: gradients were not finite too often in a row",
        "EXIT_TRY_AGAIN": "try again later: start the same command again and the run goes on",
        "EXIT_SIGNAL": "a signal asked the run to stop; it saved a checkpoint first",
    }
    codes = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    return _table(("code", "meaning"), [[f"`{code}`", says[name]] for name, code in codes.items()])


def models() -> str:
    """What `python -m breadth` saw of every family; `tests/model/test_model_breadth.py` looks again."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from breadth.checks import YES, read_seen
    from breadth.families import NOT_BUILT

    def short(answer: str) -> str:
        return "no, refused" if answer == "refused" else _cell(answer)

    seen = list(read_seen().values())
    trained = [row for row in seen if row.equal == YES]
    rows = [
        [
            ", ".join(f"`{name}`" for name in (row.family, *row.aliases)),
            "packed" if row.packed else f"padded: {_cell(row.reason)}",
            f"`{row.attention}`",
            "supervised rows" if row.fused_head else "the model's own",
            *(short(answer) for answer in (row.lora, row.recompute, row.zero3)),
        ]
        for row in trained
    ]
    heads = ("family", "documents", "attention", "head", "LoRA", "recomputation", "ZeRO-3")
    left = [[f"`{row.family}`", _cell(row.reason)] for row in seen if row not in trained]
    left += [[f"`{family}`", f"not tried: {why}"] for family, why in NOT_BUILT.items()]
    version, packed = importlib.metadata.version("transformers"), sum(row.packed for row in trained)
    return (
        f"Made with transformers {version}: {len(trained)} families, {packed} of them packed.\n\n"
        f"{_table(heads, rows)}\nNot trained:\n\n{_table(('family', 'why'), sorted(left))}"
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "keys": keys,
    "names": names,
    "formats": formats,
    "rules": rules,
    "templates": templates,
    "exit_codes": exit_codes,
    "models": models,
}


def written(page: str, only: Sequence[str] = ()) -> str:
    """The page with its tables made anew.

    Args:
        page: Markdown.
        only: Names of tables; all where there is none.
    """

    def fresh(match: re.Match[str]) -> str:
        name = match[2]
        return match[0] if only and name not in only else f"{match[1]}\n{TABLES[name]()}\n{match[3]}"

    return _PLACE.sub(fresh, page)


def main() -> None:
    """Write all tables, or those that are named."""
    for file in sorted(DOCS.glob("*.md")):
        page = file.read_text("utf-8")
        file.write_text(written(page, sys.argv[1:]), "utf-8")


if __name__ == "__main__":
    main()
