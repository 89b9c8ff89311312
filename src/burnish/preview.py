"""What can be known before a run: the data's report, and the plan. Neither loads a weight."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from burnish.config.schema import Config
from burnish.errors import ConfigError, Problem
from burnish.plan import DEVICES, Device, ModelShape, Plan, find_device, make_plan, resolve_auto

_UNITS = {"": 1, "gb": 10**9, "gib": 2**30, "g": 10**9}


def check_data(config: Config) -> tuple[dict[str, Any], str]:
    """Prepare all data and return its report, as a dictionary and as text.

    Raises:
        DataError: What `train` would raise.
    """
    from burnish.data.prepare import prepare
    from burnish.data.report import describe
    from burnish.data.tokenizer import load_tokenizer
    from burnish.data.vocabulary import require_rows

    tokenizer, template = load_tokenizer(config.model, config.data)
    data = prepare(config, tokenizer, template)
    shape = _grown_shape(config, tokenizer)
    require_rows(tokenizer, shape.vocab_size, (data.train, data.eval))
    return data.report, describe(data.report)


def plan_run(config: Config, num_gpus: int | None, gpu_memory: str | None) -> Plan:
    """Plan a run exactly as `train` will.

    Args:
        config: The run's config.
        num_gpus: Ranks to plan for; None as many as `train` would start here.
        gpu_memory: `80GB`, `24GiB` or a device's name; None where time and fit are not asked for.
    """
    from burnish.data.count import count_windows
    from burnish.data.prepare import prepare
    from burnish.data.tokenizer import load_tokenizer
    from burnish.data.windows import plan_windows
    from burnish.launch import num_workers

    device = None if gpu_memory is None else _device(gpu_memory)
    world_size = num_gpus or num_workers(config.launch)
    tokenizer, template = load_tokenizer(config.model, config.data)
    shape = _grown_shape(config, tokenizer)
    data = prepare(config, tokenizer, template)
    config = resolve_auto(config, shape, world_size, device.memory_bytes if device else None)
    packed = config.data.packing != "off"
    parallel = max(1, world_size // config.engine.sequence_parallel)
    windows = plan_windows(
        data.train, config.data, config.batch, config.train, parallel, packed, shape.cost_model()
    )
    return make_plan(config, count_windows(windows, data.train), shape, world_size, device)


def model_shape(config: Config) -> ModelShape:
    """Widths of the model, from its config.json. Reads a local folder without transformers."""
    file = Path(config.model.path) / "config.json"
    if file.is_file():
        try:
            return ModelShape.from_config_json(json.loads(file.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(Problem("model.path", f"{file} is not JSON: {error}")) from error
    from burnish.model.load import load_model_config

    return ModelShape.from_config_json(load_model_config(config.model).to_dict())


def _grown_shape(config: Config, tokenizer: Any) -> ModelShape:
    """`model_shape`, with the rows that `model.add_tokens` and `pad_vocab_multiple` add."""
    from burnish.data.tokenizer import vocabulary_of

    return model_shape(config).grown(vocabulary_of(tokenizer, config.model))


def _device(text: str) -> Device:
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    known = find_device(text)
    if known is not None:
        return known
    if match is None or match[2].lower() not in _UNITS:
        names = ", ".join(device.name for device in DEVICES)
        raise ConfigError(Problem("--gpu-memory", f"is {text!r}", f"Give 80GB, 24GiB, or one of {names}."))
    num_bytes = int(float(match[1]) * _UNITS[match[2].lower()])
    # Time needs a speed too: take the known device whose memory is closest.
    like = min(DEVICES, key=lambda device: abs(device.memory_bytes - num_bytes))
    return replace(like, name=f"{text} (speed of {like.name})", memory_bytes=num_bytes)
