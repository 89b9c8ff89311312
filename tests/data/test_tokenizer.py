"""The tokenizer and the template of a run: where they come from, and what is said when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers_on_the_spot import llama2_kind

from burnish.config.schema import DataConfig, ModelConfig
from burnish.data.sandbox import probe_template
from burnish.data.tokenizer import builtin_templates, load_tokenizer
from burnish.errors import DataError
from burnish.runtime import log


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


def test_an_end_of_turn_that_has_to_be_spelled_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "burnish")
    log.propagate = True
    _load(folder, "plain")  # ends turns with the tokenizer's own EOS
    assert not caplog.text
    _load(folder, "chatml")
    assert "model.add_tokens: ['<|im_start|>', '<|im_end|>']" in caplog.text
    caplog.clear()
    with_tokens = {"path": str(folder), "add_tokens": ["<|im_start|>", "<|im_end|>"]}
    data = DataConfig.model_validate({"train": "x", "chat_template": "chatml"})
    load_tokenizer(ModelConfig.model_validate(with_tokens), data)
    assert not caplog.text


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
