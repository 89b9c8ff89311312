"""What can be known before a run: the data's report, and the plan. Neither loads a weight."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from burnish.config.plan_options import PlanOptions
from burnish.config.schema import Config
from burnish.config.stored_weights import cannot_train_stored
from burnish.errors import ConfigError, DataError, Problem, counted
from burnish.plan import (
    DEVICES,
    FAMILIES,
    Device,
    ModelShape,
    Plan,
    explain_auto,
    find_device,
    make_plan,
    resolve_auto,
    resolve_compile,
    surely_apart,
    surely_packed,
    unshared,
    unsuited,
)

HERE = PlanOptions()
"""This machine, as `train` would use it."""
_UNITS = {"gb": 10**9, "gib": 2**30, "g": 10**9, "mb": 10**6, "mib": 2**20}
_SIZE = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-zA-Z]*)\s*")


def check_data(config: Config) -> tuple[dict[str, Any], str]:
    """Prepare all data and return its report, as a dictionary and as text.

    Raises:
        ConfigError, DataError: What `train` would raise, of model and data at once.
    """
    from burnish.data.prepare import prepare
    from burnish.data.report import describe
    from burnish.data.tokenizer import load_tokenizer
    from burnish.data.vocabulary import require_rows
    from burnish.data.windows import plan_windows

    tokenizer, template = load_tokenizer(config.model, config.data)
    shape = _grown_shape(config, tokenizer)
    problems = _model_problems(config)
    try:
        data = prepare(config, tokenizer, template)
    except DataError as error:
        if not problems:
            raise
        of_data = error.heading or "a problem of the data"
        heading = f"{of_data}, and {counted(len(problems), 'problem')} of the model"
        raise DataError(*error.problems, *problems, heading=heading) from error
    if problems:
        raise ConfigError(*problems)
    plan_windows(data.train, config.data, config.batch, config.train, world_size=1, packed=True)
    require_rows(tokenizer, shape.vocab_size, (data.train, data.eval))
    return data.report, describe(data.report)


def plan_run(config: Config, options: PlanOptions = HERE) -> Plan:
    """Plan a run exactly as `train` will.

    Args:
        config: The run's config.
        options: On what machine; time and fit are told only where its GPU is given.

    Raises:
        ConfigError: The GPU is not known, there is none, or mfu is no share.
        DataError: What `train` would raise.
    """
    from burnish.data.count import count_windows
    from burnish.data.prefixes import Prefixes
    from burnish.data.prepare import prepare
    from burnish.data.tokenizer import load_tokenizer
    from burnish.data.windows import plan_windows
    from burnish.launch import num_gpus as num_gpus_here
    from burnish.launch import num_workers
    from burnish.runtime import cxx_compiler

    device = _device(options)
    world_size = num_workers(config.launch) if options.gpus is None else options.gpus
    tokenizer, template = load_tokenizer(config.model, config.data)
    shape = _grown_shape(config, tokenizer)
    data = prepare(config, tokenizer, template)
    _require_stored(config)
    _require_parts(config)
    on_gpus = device is not None or options.gpus is not None or num_gpus_here() > 0
    kind = "cuda" if on_gpus else "cpu"
    memory = device.memory_bytes if device is not None else _memory_here(on_gpus, world_size)
    asked, config = config, resolve_auto(config, shape, world_size, memory, kind)
    packed, problem = _layout(config)
    parallel = max(1, world_size // config.engine.sequence_parallel)
    prefixes = Prefixes(data.train, unshared(config, kind, problem))
    layout = packed, shape.cost_model(), config.engine.sequence_parallel
    windows = plan_windows(data.train, config.data, config.batch, config.train, parallel, *layout, prefixes)
    counts = count_windows(windows, data.train)
    config = resolve_compile(config, counts, shape, kind, cxx_compiler() is not None)
    choices = explain_auto(asked, config, memory)
    return make_plan(config, counts, shape, world_size, device, kind, choices, memory)


def _memory_here(on_gpus: bool, world_size: int) -> int | None:
    """What `train` will find for each rank on this machine; None where the GPUs planned for are elsewhere."""
    from burnish.host_memory import free_memory_bytes
    from burnish.launch import num_gpus
    from burnish.runtime import Ranks, device_memory_bytes, pick_device

    if not on_gpus:
        free = free_memory_bytes()
        return None if free is None else free // world_size
    if num_gpus() == 0:
        return None
    here = Ranks(0, 0, 1)
    return device_memory_bytes(pick_device(here), here)


def model_shape(config: Config) -> ModelShape:
    """Widths of the model, from its config.json. Of a vision-language model what is beside the language
    model is counted too, which takes the seconds that torch needs to load."""
    values = _model_config(config)
    if not isinstance(values.get("text_config"), dict):
        return ModelShape.from_config_json(values)
    from burnish.model.foresee import shape_of
    from burnish.model.load import load_model_config

    return shape_of(load_model_config(config.model))


def _layout(config: Config) -> tuple[bool, str | None]:
    """Whether documents will be packed, and why beginnings cannot be shared: as `train` will find.

    For the usual families config.json is enough. Of others a small model is made and tried, which takes the
    seconds that torch needs to load.
    """
    model_config = _model_config(config)
    problem = unsuited(model_config, config.data.max_tokens)
    packed = surely_packed(config, model_config)
    if packed is not None and surely_apart(model_config):
        return packed, problem
    from burnish.model.foresee import foresee_capability
    from burnish.runtime import log, quieten_libraries

    quieten_libraries()
    capability = foresee_capability(config)
    if capability is None:
        if packed is None:
            log.warning(
                "Planned as packed, which the model's own code may not allow: train tries it and says."
            )
        return packed is None, problem
    return capability.packed, problem or (capability.unshared if capability.packed else None)


def _model_problems(config: Config) -> list[Problem]:
    """What `train` will say is wrong between the config and the model, found without weights.

    For the usual families config.json is enough, unless the config names parts of the model.
    """
    problems: list[Problem] = []
    for look in (_require_stored, _require_positions, _require_sharing, _require_parts):
        try:
            look(config)
        except ConfigError as error:
            problems += error.problems
    return list(dict.fromkeys(problems))  # two trials of the model may find the same


def _require_stored(config: Config) -> None:
    """Refuse weights that are stored as nobody trains them, as `train` will."""
    quantize = None if config.adapter is None else config.adapter.quantize
    problem = cannot_train_stored(_model_config(config), config.model.init, quantize)
    if problem is not None:
        raise ConfigError(problem)


def _require_positions(config: Config) -> None:
    """Refuse documents that may be longer than the model has positions for, as `train` will."""
    if surely_apart(_model_config(config)):
        return
    from burnish.model.foresee import foresee_capability
    from burnish.runtime import quieten_libraries

    quieten_libraries()
    foresee_capability(config)


def _require_sharing(config: Config) -> None:
    """Refuse to share beginnings where the model cannot, as `train` will."""
    if config.data.share_prefix == "on":
        unshared(config, "cpu", _layout(config)[1])


def _require_parts(config: Config) -> None:
    """Refuse what the model's parts cannot do, as `train` will: names of none, experts to balance, layers to
    compute again."""
    model = config.model
    is_named = bool(model.freeze or config.optim.group_lr) or config.train.router_aux_loss != 0
    again = model.mlp_tile_tokens is not None or model.activation_checkpointing not in ("none", "auto")
    if not (is_named or again) and _takes_adapter(config):
        return
    from burnish.engine.optimizer import parts_of
    from burnish.model.foresee import require_parts
    from burnish.runtime import quieten_libraries

    quieten_libraries()
    trained = require_parts(config)
    if trained is not None:
        parts_of(trained, config.optim)


def _takes_adapter(config: Config) -> bool:
    """Whether the model surely takes the adapter, if there is one; only a mixture's experts may not take
    every kind."""
    adapter, values = config.adapter, _model_config(config)
    if adapter is None:
        return True
    is_plain = adapter.kind in ("lora", "rslora") and adapter.dropout == 0
    is_usual = surely_apart(values) and (is_plain or not any("expert" in key for key in values))
    return adapter.targets == "all-linear" and is_usual


def _model_config(config: Config) -> dict[str, Any]:
    """The model's config.json. A local folder's is read without transformers where the family is known; of
    another, what the file leaves out is filled in as for `train`."""
    file = Path(config.model.path) / "config.json"
    if file.is_file():
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            cure = "Copy or download the model's folder again."
            raise ConfigError(Problem("model.path", f"{file} is not JSON: {error}", cure)) from error
        if values.get("model_type") in FAMILIES:
            return values
    from burnish.model.load import load_model_config

    return load_model_config(config.model).to_dict()


def _grown_shape(config: Config, tokenizer: Any) -> ModelShape:
    """`model_shape`, with the rows that `model.add_tokens` and `pad_vocab_multiple` add."""
    from burnish.data.tokenizer import vocabulary_of

    return model_shape(config).grown(vocabulary_of(tokenizer, config.model, config.adapter))


def _device(options: PlanOptions) -> Device | None:
    """The device asked for, by name or by the size of its memory."""
    text = options.gpu_memory
    if not 0 < options.mfu <= 1:
        raise ConfigError(Problem("--mfu", f"is {options.mfu}", "Give a share of the peak, such as 0.4."))
    if options.gpus is not None and options.gpus < 1:
        raise ConfigError(Problem("--gpus", f"is {options.gpus}", "Give at least 1, or leave it out."))
    if text is None:
        return None
    known = find_device(text)
    if known is not None:
        return replace(known, mfu=options.mfu)
    num_bytes = _num_bytes(text)
    # Time needs a speed too: take the known device whose memory is closest.
    like = min(DEVICES, key=lambda device: abs(device.memory_bytes - num_bytes))
    name = f"{text} (speed of {like.name})"
    return replace(like, name=name, memory_bytes=num_bytes, mfu=options.mfu)


def _num_bytes(text: str) -> int:
    """A size with its unit. A bare number is refused: nobody means bytes, and every other unit is a guess."""
    match = _SIZE.fullmatch(text)
    if match is not None and not match[2]:
        number = match[1]
        cure = f"Give it its unit: {number}GB or {number}GiB."
        raise ConfigError(Problem("--gpu-memory", f"is {text!r}, a number without a unit", cure))
    num_bytes = int(float(match[1]) * _UNITS.get(match[2].lower(), 0)) if match is not None else 0
    if num_bytes == 0:
        names = ", ".join(device.name for device in DEVICES)
        raise ConfigError(Problem("--gpu-memory", f"is {text!r}", f"Give 80GB, 24GiB, or one of {names}."))
    return num_bytes
