"""What pages say about keys, rules, templates and exit codes is what the code says."""

import importlib.util
import re
from pathlib import Path

import pytest

from burnish.config.names import keys_by_name
from burnish.config.row_rules import RULES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
_CURE = "a page is not current: run `python docs/generate.py`"

_SPEC = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
assert _SPEC is not None and _SPEC.loader is not None
generate = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(generate)


@pytest.mark.parametrize("table", [name for name in generate.TABLES if name != "templates"])
def test_a_table_is_current(table):
    for file in PAGES:
        page = file.read_text("utf-8")
        assert generate.written(page, [table]) == page, f"{file.name}: {_CURE}"


def test_the_table_of_templates_is_current():
    pytest.importorskip("trl")
    page = (DOCS / "templates.md").read_text("utf-8")
    assert generate.written(page, ["templates"]) == page, _CURE


def test_every_table_has_a_place():
    pages = "".join(file.read_text("utf-8") for file in PAGES)
    assert set(re.findall(r"made by docs/generate\.py: (\w+)", pages)) == set(generate.TABLES)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{file.name}" for file in PAGES)])
def test_keys_that_a_page_names_exist(page):
    known = set(keys_by_name())
    sections = {name.split(".")[0] for name in known if "." in name}
    for name in re.findall(r"`((?:\w+\.)+\w+)(?::[^`]*)?`", (ROOT / page).read_text("utf-8")):
        section, _, rest = name.partition(".")
        if section not in sections or rest in ("md", "json", "jsonl", "yaml", "py", "html"):
            continue
        parts = name.split(".")
        rule = parts[2] if parts[:2] == ["data", "bad_row_rules"] and len(parts) > 2 else None
        if rule is not None:
            assert rule in RULES or rule.isupper(), f"{page} names the rule {rule}"
        elif name not in ("data.eval", "data.train"):
            assert name in known, f"{page} names the key {name}"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_links_lead_somewhere(file):
    page = file.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+\.md)(?:#[\w-]+)?\)", page):
        assert (DOCS / target).is_file(), f"{file.name} links to {target}"
    assert f"{file.name}" in (ROOT / "mkdocs.yml").read_text("utf-8"), "not in the navigation"
