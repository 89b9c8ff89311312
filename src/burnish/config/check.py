"""Contradictions between keys, and files that are not there: found before anything is loaded."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from burnish.config.adapter_file import recorded_base
from burnish.config.layout import OWN_ATTENTION, refused_layout
from burnish.config.raw_deepspeed import misspelt_settings, refused_settings
from burnish.config.row_rules import misnamed_rules
from burnish.config.run_folder import check_output, check_resumed
from burnish.config.schema import Config, SourceConfig
from burnish.config.stored_weights import cannot_pack
from burnish.durable import unreadable_files
from burnish.errors import ConfigError, Problem

DATA_SUFFIXES = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather",
    ".gz", ".bz2", ".xz", ".zst",
)  # fmt: skip
"""Endings of files that hold rows, and of those compressed; a test holds them to what `data/load.py` has."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CURE_READ = "Have its owner let you read it, or run as somebody who may."
_GLOB = re.compile(r"[*?\[]")


def check_config(config: Config) -> list[Problem]:
    """Every contradiction in a config whose keys are each right.

    Looks at the file system (data, model folder, template, checkpoint), never at the network, and
    imports nothing heavy. What only the tokenizer, the rows or the device can tell comes later.
    """
    checks = (_check_model, _check_sources, _check_data, contradictions, check_resumed, check_output)
    problems: list[Problem] = []
    for check in checks:
        try:
            problems += check(config)
        except PermissionError as error:
            what = "may not be looked at: permission denied"
            problems.append(Problem(str(error.filename), what, _CURE_READ))
    return list(dict.fromkeys(problems))  # two checks may look at the same folder


def contradictions(config: Config) -> Iterator[Problem]:
    """Those of `check_config` that keys alone tell: a pure function."""
    yield from _check_model_keys(config)
    if config.model.compile is True:
        yield from compile_conflicts(config)
    yield from refused_layout(config)
    yield from _check_batch(config)
    yield from _check_engine(config)
    yield from _check_training(config)


def _check_model(config: Config) -> Iterator[Problem]:
    model = config.model
    folder = Path(model.path)
    if not model.path.strip():
        yield Problem("model.path", "is empty", "Give a hub name or a folder.")
    elif folder.is_dir():
        yield from _check_model_folder(folder, model.init == "pretrained")
    elif folder.is_file():
        yield Problem("model.path", f"{model.path} is a file", "Give the folder that holds config.json.")
    elif not _HUB_NAME.fullmatch(model.path):
        cure = "Give a folder that exists, or a hub name like meta-llama/Llama-3.1-8B."
        yield Problem("model.path", f"there is no folder {model.path}", cure)
    if model.trust_remote_code and model.revision is None and not folder.is_dir():
        cure = "Pin the commit that you have read: model.revision: COMMIT."
        yield Problem("model.trust_remote_code", "is true for a hub model without model.revision", cure)


def _check_model_keys(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.mlp_tile_tokens is not None and config.train.router_aux_loss != 0:
        what = "does not go with train.router_aux_loss: a router's balance is that of all tokens together"
        yield Problem("model.mlp_tile_tokens", what, "Leave one of them out.")
    if any(not token.strip() for token in model.add_tokens):
        yield Problem("model.add_tokens", "holds an empty token", "Take it out.")
    if config.adapter is not None and model.pad_vocab_multiple is not None:
        what = "is set together with adapter: an adapter's base keeps its own size"
        yield Problem("model.pad_vocab_multiple", what, "Leave it out.")
    if config.adapter is not None and config.adapter.targets == ():
        cure = "Name modules, or leave it all-linear."
        yield Problem("adapter.targets", "is an empty list: nothing would be trained", cure)


def compile_conflicts(config: Config) -> Iterator[Problem]:
    """What of a config does not go with compiled layers."""
    cure = "Leave one of them out."
    if config.model.activation_checkpointing == "light":
        what = "does not go with activation_checkpointing: light, which is what the compiler does by itself"
        yield Problem("model.compile", what, "Set model.activation_checkpointing: none.")
    if config.model.mlp_tile_tokens is not None:
        yield Problem("model.compile", "does not go with model.mlp_tile_tokens yet", cure)
    if config.engine.sequence_parallel > 1:
        yield Problem("model.compile", "does not go with engine.sequence_parallel yet", cure)
    if config.engine.zero_stage == 3 and not _is_local(config):
        what = "does not go with ZeRO 3, which gathers weights in the middle of a layer"
        yield Problem("model.compile", what, "Set engine.zero_stage: 2, or leave model.compile out.")


def _check_model_folder(folder: Path, reads_weights: bool) -> Iterator[Problem]:
    yield from unreadable_model(folder)
    has_config, has_adapter = ((folder / f"{n}config.json").is_file() for n in ("", "adapter_"))
    others = any(not path.name.startswith("adapter_model") for path in folder.glob("*.safetensors"))
    if has_config and has_adapter and others and reads_weights:  # both would be loaded as one, and frozen
        cure = "Move adapter_config.json and adapter_model.safetensors to a folder of their own."
        yield Problem("model.path", f"{folder} holds an adapter beside the model", cure)
    if has_config and (others or not has_adapter or not reads_weights):
        return
    if has_adapter:
        base = recorded_base(folder) or "its base"
        cure = (
            f"To go on training it: adapter.path: {folder} and model.path: {base}. "
            f"Or merge it: burnish merge {folder} OUT; then model.path: OUT."
        )
        yield Problem("model.path", f"{folder} is an adapter, not a model", cure)
        return
    results = _results_of_run(folder)
    if results:
        yield Problem("model.path", f"{folder} is a run, not a model", f"Give its result: {results}.")
        return
    cure = _CURE_CHECKPOINT if _is_checkpoint(folder) else "Give a Hugging Face model folder."
    yield Problem("model.path", f"{folder} has no config.json", cure)


_CURE_CHECKPOINT = (
    "A checkpoint is what a run goes on from, no model. To make one of it: `burnish train CONFIG` with "
    "checkpoint.resume: CHECKPOINT, train.max_steps: its step, and another output_dir."
)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "MANIFEST.json").is_file()


def _results_of_run(folder: Path) -> str:
    return " or ".join(str(folder / name) for name in ("final", "best") if (folder / name).is_dir())


def unreadable_model(folder: Path) -> list[Problem]:
    """A problem for each file of a model's folder that this user may not read."""
    what = "cannot be read: permission denied"
    return [Problem("model.path", f"{path} {what}", _CURE_READ) for path in unreadable_files(folder)]


def require_model(path: str) -> None:
    """Nothing, if a finished model or adapter may be there: on this machine, or on the hub.

    Raises:
        ConfigError: It is a folder that holds neither; where it is a run's, its results are named.
    """
    folder = Path(path)
    configs = ("config.json", "adapter_config.json")
    if not folder.is_dir() or any((folder / name).is_file() for name in configs):
        return
    results = _results_of_run(folder)
    if results:
        raise ConfigError(Problem(path, "is a run, not a model", f"Give its result: {results}."))
    other = "Give a model folder, an adapter folder, or a hub name."
    cure = _CURE_CHECKPOINT if _is_checkpoint(folder) else other
    raise ConfigError(Problem(path, "has neither config.json nor adapter_config.json", cure))


def _check_sources(config: Config) -> Iterator[Problem]:
    for key, sources in (("train", config.data.train), ("eval", config.data.eval or ())):
        names: set[str] = set()
        for index, source in enumerate(sources):
            where = f"data.{key}[{index}]" if len(sources) > 1 else f"data.{key}"
            yield from check_source(where, source)
            if source.name is not None and source.name in names:
                cure = "Give each source its own name."
                yield Problem(f"{where}.name", f"{source.name!r} stands twice in data.{key}", cure)
            if source.name is not None:
                names.add(source.name)
            if source.weight != 1.0 and (config.data.mix == "concat" or key == "eval"):
                cure = "Set data.mix: weighted, or leave the weight out."
                what = f"is {source.weight:g}, but weights only count in data.train with data.mix: weighted"
                yield Problem(f"{where}.weight", what, cure)


def check_source(where: str, source: SourceConfig) -> Iterator[Problem]:
    """What is wrong with a source's path, as far as the file system alone can tell; `where` names it."""
    path = os.path.expanduser(source.path)  # noqa: PTH111 - Path's raises where there is no such user
    if not path.strip():
        yield Problem(where, "is an empty path", "Give a file, a folder, a glob or a hub name.")
    elif Path(path).exists():
        return
    elif _GLOB.search(path):
        if not glob.glob(path, recursive=True):  # noqa: PTH207 - Path.glob takes no absolute pattern
            yield Problem(where, f"no file matches {path}", _where_looked())
    elif not may_be_hub_data(path):
        yield Problem(where, f"there is no file or folder {path}", _where_looked())


def may_be_hub_data(path: str) -> bool:
    """Whether a path where nothing is may name a data set on the hub: `owner/name`, `owner/name:config`."""
    name, colon, config = path.partition(":")
    is_config = not colon or re.fullmatch(r"[\w.-]+", config) is not None
    return is_config and not path.lower().endswith(DATA_SUFFIXES) and _HUB_NAME.fullmatch(name) is not None


def _where_looked() -> str:
    return f"Paths are relative to the folder that burnish runs in, {Path.cwd()}."


def _check_data(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.max_tokens < 2:
        cure = "Give at least 2: the first token is never predicted."
        yield Problem("data.max_tokens", f"is {data.max_tokens}: nothing can be learned", cure)
    yield from misnamed_rules(data.bad_row_rules)
    if data.eval is not None and data.eval_fraction > 0:
        cure = "Keep data.eval, or data.eval_fraction to hold out part of data.train."
        yield Problem("data.eval_fraction", "is set together with data.eval", cure)
    if config.eval.every_steps is not None and data.eval is None and data.eval_fraction == 0:
        cure = "Set data.eval, or data.eval_fraction: 0.05."
        yield Problem("eval.every_steps", "is set, but there is no data to evaluate on", cure)
    template = data.chat_template
    if template is not None and re.search(r"[/\\]|\.(jinja2?|j2|txt)$", template):
        if not Path(template).is_file():
            cure = "Give a template file that exists, or the name of a built-in one."
            yield Problem("data.chat_template", f"there is no file {template}", cure)
    elif template == "":
        yield Problem("data.chat_template", "is empty", "Leave it out to use the tokenizer's own.")


def _check_batch(config: Config) -> Iterator[Problem]:
    batch = config.batch
    if batch.global_examples is not None and batch.global_tokens is not None:
        cure = "Keep one: a step counts examples or tokens."
        yield Problem("batch.global_tokens", "is set together with batch.global_examples", cure)
    if batch.micro_examples is not None and batch.micro_tokens != "auto":
        cure = "Keep one: a forward is cut by tokens or by examples."
        yield Problem("batch.micro_examples", "is set together with batch.micro_tokens", cure)


_CURE_LOCAL = "Set engine.kind: deepspeed, or leave it out."


def _check_offloading(config: Config) -> Iterator[Problem]:
    engine = config.engine
    if engine.offload_params != "none" and engine.zero_stage != 3:
        cure = "Set engine.zero_stage: 3, or leave engine.offload_params out."
        yield Problem(
            "engine.offload_params", f"needs ZeRO 3, but engine.zero_stage is {engine.zero_stage}", cure
        )
    if engine.offload_optimizer != "none" and engine.zero_stage == 0:
        cure = "Set engine.zero_stage: 2, or leave engine.offload_optimizer out."
        yield Problem("engine.offload_optimizer", "needs ZeRO 1 or higher, but engine.zero_stage is 0", cure)
    for key in ("offload_optimizer", "offload_params"):
        where = getattr(engine, key)
        if where != "none" and engine.kind == "local":
            yield Problem(f"engine.{key}", f"is {where}, but engine.kind is local", _CURE_LOCAL)
    yield from _check_nvme(config)


def _check_nvme(config: Config) -> Iterator[Problem]:
    engine = config.engine
    if engine.offload_params == "nvme" and config.model.dtype == "fp32":
        # Seen with DeepSpeed 0.19.8, which says nothing of it.
        what = "is nvme, where DeepSpeed rounds weights to bf16, but model.dtype is fp32"
        yield Problem("engine.offload_params", what, "Set model.dtype: bf16, or engine.offload_params: cpu.")
    if engine.offload_params == "nvme" and engine.offload_optimizer != "nvme" and config.adapter is None:
        # DeepSpeed cannot load such a checkpoint; masters and moments are six times the weights anyway.
        what = "is nvme, but the state of the optimizer, which is larger, is not"
        cure = "Set engine.offload_optimizer: nvme, or engine.offload_params: cpu."
        yield Problem("engine.offload_params", what, cure)
    if engine.offload_optimizer == "nvme" and engine.zero_stage != 3:
        cure = "Set engine.zero_stage: 3, or engine.offload_optimizer: cpu."
        what = f"is nvme, which needs ZeRO 3, but engine.zero_stage is {engine.zero_stage}"
        yield Problem("engine.offload_optimizer", what, cure)
    if engine.nvme_path is not None and "nvme" not in (engine.offload_optimizer, engine.offload_params):
        cure = "Set engine.offload_optimizer or offload_params to nvme, or leave engine.nvme_path out."
        yield Problem("engine.nvme_path", "is set, but nothing is offloaded to nvme", cure)


def _is_local(config: Config) -> bool:
    """Whether DeepSpeed does not run, as far as the config alone can tell."""
    one_process = config.launch.num_processes == 1
    return not config.engine.uses_deepspeed(1 if one_process else 2)


def _check_engine(config: Config) -> Iterator[Problem]:
    engine, adapter = config.engine, config.adapter
    local = _is_local(config)
    if adapter is not None and adapter.quantize is not None and engine.zero_stage == 3 and not local:
        cure = "Use engine.zero_stage: 2 with a quantised base, or leave adapter.quantize out."
        yield Problem("adapter.quantize", f"{adapter.quantize} does not work with engine.zero_stage 3", cure)
    yield from cannot_pack(config)
    yield from _check_offloading(config)
    if engine.hpz_size > 1 and (engine.zero_stage != 3 or local):
        what = f"is {engine.hpz_size}, but weights are not sharded: it needs DeepSpeed's ZeRO 3"
        yield Problem("engine.hpz_size", what, "Set engine.zero_stage: 3, or leave engine.hpz_size out.")
    yield from refused_settings(engine.deepspeed)
    yield from misspelt_settings(engine.deepspeed)
    if engine.deepspeed and local:
        yield Problem("engine.deepspeed", "is set, but DeepSpeed does not run here", _CURE_LOCAL)
    yield from _check_sequence_parallel(config)


def _check_sequence_parallel(config: Config) -> Iterator[Problem]:
    size, processes = config.engine.sequence_parallel, config.launch.num_processes
    if size == 1:
        return
    where, cure = "engine.sequence_parallel", "Leave it at 1, or change the other."
    if processes != "auto" and processes % size:
        what = f"is {size}, which does not divide launch.num_processes {processes}"
        yield Problem(where, what, f"Start a multiple of {size} processes.")
    if config.data.packing == "off" or config.model.attention not in OWN_ATTENTION:
        yield Problem(where, "needs data.packing and our attention (model.attention: auto)", cure)
    if config.train.neftune_alpha is not None:
        yield Problem(where, "does not go with train.neftune_alpha yet", cure)
    if config.train.router_aux_loss != 0:
        yield Problem(where, "does not go with train.router_aux_loss yet", cure)


def unsuited_optimizer(config: Config) -> Problem | None:
    """Why `optim.name` cannot work under DeepSpeed as configured, if it cannot."""
    name, stage = config.optim.name, config.engine.zero_stage
    if name == "adafactor" and stage > 0:
        what = f"adafactor looks at whole matrices, which engine.zero_stage {stage} cuts into pieces"
        return Problem("optim.name", what, "Set engine.zero_stage: 0, or optim.name: adamw_8bit.")
    if name in ("muon", "adamw_8bit") and config.engine.offload_optimizer != "none":
        what = f"{name} is not supported with engine.offload_optimizer {config.engine.offload_optimizer}"
        return Problem("optim.name", what, "Set engine.offload_optimizer: none, or optim.name: adamw.")
    return None


def _check_training(config: Config) -> Iterator[Problem]:
    processes = config.launch.num_processes
    is_deepspeed = config.engine.uses_deepspeed(1 if processes == "auto" else processes)
    problem = unsuited_optimizer(config) if is_deepspeed else None
    if problem is not None:
        yield problem
    schedule = config.schedule
    if schedule.name == "wsd" and schedule.warmup_ratio + schedule.decay_ratio > 1:
        what = f"is {schedule.decay_ratio:g}, with warmup_ratio {schedule.warmup_ratio:g} more than all steps"
        yield Problem("schedule.decay_ratio", what, "Let the two add up to 1 at most.")
    for pattern in (*config.model.freeze, *config.optim.group_lr):
        if not pattern.strip("*"):
            key = "model.freeze" if pattern in config.model.freeze else "optim.group_lr"
            yield Problem(key, f"{pattern!r} names everything", "Name a part, like embed_tokens or layers.0.")
