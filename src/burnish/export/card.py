"""The model card: what this is, what it was made from, how it was trained. It names no secret."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

from burnish import __version__
from burnish.config.schema import Config, SourceConfig

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
FACTS_FILE = "burnish.json"


@dataclass(frozen=True)
class ExportFacts:
    """What the run knows about itself, for the card."""

    num_steps: int
    num_examples: int
    num_supervised_tokens: int
    results: Mapping[str, float] = field(default_factory=dict)
    """By name, for example the evaluation loss."""


def public_name(path: str) -> str:
    """A path as a stranger may read it: no user or password, no query, no folders of this machine."""
    if "://" in path:
        parts = urlsplit(path)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    if _HUB_NAME.fullmatch(path) and not Path(path).exists():
        return path
    return Path(path).name


def model_card(config: Config, name: str, facts: ExportFacts) -> str:
    """The README.md of an exported folder, in the hub's format.

    Args:
        config: The run.
        name: What the result is called.
        facts: What the run did.
    """
    is_adapter = config.adapter is not None
    base = public_name(config.model.path)
    header: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "burnish", *(["lora"] if is_adapter else [])],
    }
    if "/" in base:
        header["base_model"] = base
    made = "An adapter for" if is_adapter else "Fine-tuned from"
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [f"{made} `{base}` by supervised fine-tuning with Burnish {__version__}.", ""]
    lines += ["## Data", "", *(_source_line(source, config) for source in config.data.train), ""]
    lines += ["## Training", "", *(f"- {what}: {value}" for what, value in _settings(config, facts).items())]
    if facts.results:
        lines += ["", "## Results", "", *(f"- {what}: {value}" for what, value in facts.results.items())]
    return "\n".join([*lines, ""])


def _source_line(source: SourceConfig, config: Config) -> str:
    weight = f", weight {source.weight:g}" if config.data.mix == "weighted" else ""
    return f"- `{public_name(source.path)}`{weight}"


def _settings(config: Config, facts: ExportFacts) -> dict[str, str]:
    size = (
        f"{config.batch.global_tokens:,} tokens"
        if config.batch.global_tokens
        else f"{config.batch.global_examples or 128:,} examples"
    )
    settings = {
        "steps": f"{facts.num_steps:,} of {size}",
        "examples seen": f"{facts.num_examples:,}",
        "tokens trained on": f"{facts.num_supervised_tokens:,} ({config.data.train_on} turns)",
        "learning rate": f"{config.optim.lr:g}, {config.schedule.name}, "
        f"warm-up {config.schedule.warmup_ratio:g}",
        "optimizer": f"{config.optim.name}, weight decay {config.optim.weight_decay:g}",
        "precision": config.model.dtype,
        "longest example": f"{config.data.max_tokens:,} tokens",
        "seed": str(config.train.seed),
    }
    if config.adapter is not None:
        adapter = config.adapter
        settings["adapter"] = f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha:g}"
        if adapter.path is not None:
            settings["begun with the adapter"] = f"`{_result_name(adapter.path)}`"
        if adapter.quantize:
            settings["base kept in"] = adapter.quantize
    return settings


def _result_name(path: str) -> str:
    """What a result is called: by its run's name, where it is a run's `final` or `best`."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name in ("final", "best") else folder.name


def write_facts(folder: Path, facts: ExportFacts) -> None:
    """Write beside the card what a program wants to know of it."""
    values = {
        "burnish": __version__,
        "step": facts.num_steps,
        "num_examples": facts.num_examples,
        "num_supervised_tokens": facts.num_supervised_tokens,
    }
    (folder / FACTS_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def trained_steps(folder: str) -> int | None:
    """Optimizer steps that an exported folder's model was trained; None where the folder does not say."""
    try:
        step = json.loads((Path(folder) / FACTS_FILE).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
