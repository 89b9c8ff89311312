"""What a resumed run must share with the run it goes on from, by name and as readable as can be.

What it need not share, but what decides how it learns, is told.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from burnish.checkpoint.manifest import hash_file
from burnish.config.adapter_file import WEIGHTS_FILE
from burnish.config.schema import Config
from burnish.config.yaml_text import read_yaml
from burnish.data.store import ExampleStore
from burnish.errors import ConfigError, MachineError, Problem
from burnish.runtime import Ranks, gather_objects

_TOLD_SECTIONS = ("optim", "schedule", "train")
_SHARED = ("output_dir", "batch", "optim", "schedule", "train", "eval", "engine", "checkpoint", "log")
_REFUSED = ("optim.name", "train.seed")  # or told by who allows the change


def fingerprints(config: Config, vocabulary: str, template: str | None, data_hash: str) -> Mapping[str, str]:
    """Everything that decides which examples a step sees, in which tokens, and what they train.

    What only changes how a step is computed (ranks, ZeRO stage, packing, budgets), how fast it learns
    (rate, schedule, length of the run) or what is written is left out: a run may go on with another, and
    `changed_settings` tells of it.
    Small values stand as they are, so that a refusal says what was and what is.

    Args:
        config: The run.
        vocabulary: The tokenizer, serialised.
        template: The chat template's text, if there is one.
        data_hash: `PreparedData.fingerprint`: of the prepared examples, whatever they came from.
    """
    data = config.data
    sources = [[s.path, s.weight] for s in data.train] if data.mix == "weighted" else data.mix
    values: dict[str, Any] = {
        "model.path": config.model.path,
        "model.revision": config.model.revision,
        "model.freeze": sorted(config.model.freeze),
        "model.pad_vocab_multiple": config.model.pad_vocab_multiple,
        "adapter": None if config.adapter is None else config.adapter.model_dump(exclude={"path"}),
        "data": data_hash,
        "data.mix": sources,
        "tokenizer": xxhash.xxh3_128_hexdigest(vocabulary.encode()),
        "data.chat_template": None if template is None else xxhash.xxh3_128_hexdigest(template.encode()),
        "batch.global_examples": config.batch.global_examples,
        "batch.global_tokens": config.batch.global_tokens,
        "train.seed": config.train.seed,
        "optim.name": config.optim.name,
        # Its factors may change; its parts and their order decide how the optimizer's state is laid out.
        "optim.group_lr (parts)": list(config.optim.group_lr),
    }
    if config.model.init != "pretrained":  # older checkpoints do not name it
        values["model.init"] = config.model.init
    if config.adapter is not None and config.adapter.path is not None:
        weights = Path(config.adapter.path) / WEIGHTS_FILE
        values["adapter.path"] = hash_file(weights).xxh3_128  # the content, wherever it lies
    return {name: json.dumps(value) for name, value in values.items()}


def what_ranks_share(config: Config, held_out: ExampleStore | None) -> dict[str, str]:
    """By name, what else decides which collectives a rank comes to: settings, the length of evaluations."""
    values = config.model_dump(mode="json")
    shared = {name: values[name] for name in _SHARED}
    if held_out is not None:
        shared["data.eval"] = [len(held_out), int(held_out.num_tokens.sum())]
    return {name: json.dumps(value) for name, value in shared.items()}


def require_same(values: Mapping[str, str], ranks: Ranks) -> None:
    """Refuse ranks that would not do the same: each would wait for the others in collectives that never come.

    Args:
        values: What all have to share, by name.
        ranks: This process among the others; all of them call this.

    Raises:
        MachineError: On every rank, with one problem per name that differs.
    """
    seen = gather_objects((socket.gethostname(), dict(values)), ranks)
    host, first = seen[0]
    for rank, (other_host, other) in enumerate(seen):
        names = [name for name in first if other.get(name) != first[name]]
        if names:
            who = f"rank {rank} on {other_host}"
            cure = "Give all hosts the same files (config, data, model folder), then run the same command."
            head = Problem(who, f"would train on something else than rank 0 on {host}; what differs:", cure)
            problems = [Problem(name, f"{first[name]} on rank 0, {other.get(name)} there") for name in names]
            raise MachineError(head, *problems, heading="", everywhere=True)


def changed_settings(checkpoint: Path, config: Config) -> list[str]:
    """A line for each key of `optim`, `schedule` and `train` that a run may change as it goes on, and does.

    Args:
        checkpoint: Its folder, in a run's `checkpoints/`; what the run was is read from the `config.yaml`
            that it left beside them.
        config: The run now.
    """
    file = checkpoint.parent.parent / "config.yaml"
    try:
        before = read_yaml(file.read_text(encoding="utf-8"), str(file)).value
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        return [f"Whether optim, schedule or train changed cannot be told: {file} cannot be read: {error}"]
    was, now = _told(before), _told(config.model_dump(mode="json"))
    # A key that the file does not have came with a newer version.
    changed = [name for name in now if name in was and was[name] != now[name]]
    return [f"{name}: {json.dumps(was[name])} before, {json.dumps(now[name])} now" for name in changed]


def _told(tree: Any) -> dict[str, Any]:
    """The values of the sections that are told, by dotted name; of what is no config, none."""
    sections = {name: tree.get(name) for name in _TOLD_SECTIONS} if isinstance(tree, dict) else {}
    return {
        f"{name}.{key}": value
        for name, section in sections.items()
        if isinstance(section, dict)
        for key, value in section.items()
        if f"{name}.{key}" not in _REFUSED
    }
