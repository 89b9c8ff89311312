"""Every config that is shipped is one that the loader takes and the checks find nothing wrong with."""

import json
import re
from pathlib import Path

import pytest

from burnish.config.load import load_config
from burnish.config.schema import Config
from burnish.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def _sources(text: str) -> list[str]:
    return re.findall(r"data/[\w./*-]+", text)


def _made_up(folder: Path, text: str) -> None:
    """The files that a config names."""
    for name in _sources(text):
        file = folder / name.replace("*", "part")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def _load(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    _made_up(folder, text)
    (folder / "config.yaml").write_text(text)
    for name in re.findall(r"^adapter:\n  path: (\S+)", text, re.MULTILINE):
        (folder / name).mkdir(parents=True)
        adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(adapter))
        (folder / name / "adapter_model.safetensors").touch()
    monkeypatch.chdir(folder)
    return load_config(Path("config.yaml"), [])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_a_config_without_a_problem(file, tmp_path, monkeypatch):
    config = _load(tmp_path, file.read_text(), monkeypatch)
    assert config.output_dir == f"runs/{file.stem}", "two examples must not write into one folder"


def test_the_examples_are_those_that_the_docs_name():
    page = (ROOT / "docs" / "index.md").read_text()
    named = set(re.findall(r"^\| `(\w+\.yaml)` \|", page, re.MULTILINE))
    assert named == {file.name for file in EXAMPLES} and len(named) >= 7


def test_a_broken_example_would_be_seen(tmp_path, monkeypatch):
    text = (ROOT / "examples" / "full.yaml").read_text().replace("max_tokens", "max_token")
    with pytest.raises(ConfigError, match="max_tokens"):
        _load(tmp_path, text, monkeypatch)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md"))])
def test_yaml_in_the_pages_is_config(page, tmp_path, monkeypatch):
    """Blocks with all that a run needs load as they are; parts of a config load into a whole one."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    needs = {
        "model": "model: {path: a/b}\n",
        "data": "data: {train: data/x.jsonl}\n",
        "output_dir": "output_dir: o\n",
    }
    for number, block in enumerate(blocks):
        if not re.search(r"^\w+:", block, re.MULTILINE):
            continue
        missing = "".join(
            text for key, text in needs.items() if not re.search(rf"^{key}:", block, re.MULTILINE)
        )
        folder = tmp_path / str(number)
        folder.mkdir()
        names = re.findall(r"\b[\w/*-]+\.(?:jsonl|parquet)\b", block)
        for name in names:
            file = folder / name.replace("*", "part")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        _load(folder, block + missing, monkeypatch)
