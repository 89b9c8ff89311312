"""The tokenizer and the template of a run: where they come from, and what is said when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers_on_the_spot import llama2_kind

from burnish.config.schema import DataConfig, ModelConfig
from burnish.data.sandbox import probe_template
from burnish.data.tokenizer import builtin_templates, load_tokenizer
from burnish.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    llama2_kind().save_pretrained(path)
    return path


def _load(folder: Path | str, template: str | None = None) -> str | None:
    model = ModelConfig.model_validate({"path": str(folder)})
    return load_tokenizer(model, DataConfig.model_validate({"train": "x", "chat_template": template}))[1]


def test_a_tokenizer_without_a_template(folder: Path) -> None:
    assert _load(folder) is None


def test_built_in_names_and_files(folder: Path, tmp_path: Path) -> None:
    assert _load(folder, "chatml") == builtin_templates()["chatml"]
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    assert _load(folder, str(own)) == "{{ messages }}"


def test_the_tokenizers_own_template(tmp_path: Path) -> None:
    tokenizer = llama2_kind()
    tokenizer.chat_template = "{{ messages[0] }}"
    tokenizer.save_pretrained(tmp_path)
    assert _load(tmp_path) == "{{ messages[0] }}"


def test_what_is_missing_is_named_with_a_cure(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chatml"):
        _load(folder, "chatlm")
    with pytest.raises(DataError, match="no such file"):
        _load(folder, str(tmp_path / "none.jinja"))
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        _load(tmp_path)


def test_a_template_that_fills_the_memory_is_refused() -> None:
    with pytest.raises(DataError, match="1 GiB"):
        probe_template("{{ 'x' * 10**10 }}")
    probe_template("{{ raise_exception('not like this') }}")
