"""The adapter that a run begins with (`adapter.path`): what its adapter_config.json says, in our keys.

Only plain JSON is read here. Its weights are `model/begin.py`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from burnish.config.schema import AdapterConfig, Config
from burnish.durable import unreadable_files
from burnish.errors import ConfigError, Problem, first_few

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEPT = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "target_modules", "target_parameters", "exclude_modules", "use_rslora", "use_dora", "bias",
    "init_lora_weights", "trainable_token_indices",
})  # fmt: skip
"""What goes on as it is, each looked at below."""
_IDLE = frozenset({
    "auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size",
    "layers_pattern", "eva_config", "runtime_config", "ensure_weight_tying",
})  # fmt: skip
"""What says nothing of the weights, or only together with something that is refused."""
_HARMLESS_INIT = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to begin that leave the base as it was published."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def with_its_adapter(config: Config) -> tuple[Config, list[Problem]]:
    """The config, with what it leaves to the adapter that it begins with; and what keeps it from that one.

    Kind, rank, alpha, dropout and targets are the adapter's where the config does not set them, and so is
    the tokenizer (with its chat template) where the adapter's folder has one. A pure function of the config
    and that folder.
    """
    adapter = config.adapter
    if adapter is None or adapter.path is None:
        return config, []
    folder = Path(adapter.path)
    try:
        problems = [*_check_folder(folder)]
        file = {} if problems else _read(folder)
    except ConfigError as error:
        return config, list(error.problems)
    problems += [] if problems else _not_kept(folder, file)
    if problems:
        return config, problems
    own = _own(file)
    problems = [*_contradictions(adapter, own), *_check_base(config, file)]
    begun = adapter.model_copy(update={k: v for k, v in own.items() if k not in adapter.model_fields_set})
    # Of names in another order the one of the file is taken, so that equal runs have equal configs.
    begun = begun.model_copy(update={"targets": own["targets"]})
    model = config.model
    if model.tokenizer is None and _has_tokenizer(folder):
        model = model.model_copy(update={"tokenizer": adapter.path})
    return config.model_copy(update={"adapter": begun, "model": model}), problems


def recorded_base(folder: Path) -> str | None:
    """The base that an adapter's folder names; None where it names none."""
    try:
        base = _read(folder).get("base_model_name_or_path")
    except ConfigError:
        return None
    return base if isinstance(base, str) and base else None


def tokenizer_place(path: str) -> str:
    """Where the tokenizer of a finished model or adapter is: in its folder, or with the base of an adapter
    that peft alone has saved."""
    folder = Path(path)
    if _has_tokenizer(folder) or not (folder / CONFIG_FILE).is_file():
        return path
    return recorded_base(folder) or path


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def token_rows_of(adapter: AdapterConfig | None) -> tuple[int, ...]:
    """Tokens whose rows come with the adapter that a run begins with, ascending."""
    if adapter is None or adapter.path is None:
        return ()
    return tuple(sorted(_tokens(_read(Path(adapter.path))) or ()))


def modules_left_out(adapter: AdapterConfig) -> list[str]:
    """Modules that the adapter that a run begins with leaves out of its targets."""
    return [] if adapter.path is None else list(_read(Path(adapter.path)).get("exclude_modules") or ())


def doubt_about_base(config: Config) -> str | None:
    """Why nobody can tell from names alone whether the run's adapter was trained on this base; None where
    they say so."""
    adapter = config.adapter
    if adapter is None or adapter.path is None:
        return None
    recorded, path = recorded_base(Path(adapter.path)), config.model.path
    if recorded is None:
        return f"{adapter.path} does not say which base it was trained on; make sure that it is {path}"
    if _same_base(recorded, path) is None:
        return f"{adapter.path} was trained on {recorded}; make sure that {path} is the same model"
    revision = _read(Path(adapter.path)).get("revision")
    if revision and revision != config.model.revision and not Path(path).is_dir():
        return f"{adapter.path} was trained on revision {revision} of {path}; model.revision is another"
    return None


def _check_folder(folder: Path) -> Iterator[Problem]:
    key = "adapter.path"
    if not folder.is_dir():
        cure = "Give the folder of an adapter, for example runs/first/final."
        if not folder.exists() and _HUB_NAME.fullmatch(str(folder)):
            cure = f"One on the hub is downloaded first: hf download {folder} --local-dir FOLDER. " + cure
        yield Problem(key, f"there is no folder {folder}", cure)
        return
    for path in unreadable_files(folder):
        yield Problem(key, f"{path} cannot be read: permission denied", "Have its owner let you read it.")
    if not (folder / CONFIG_FILE).is_file():
        yield Problem(key, f"{folder} is not an adapter (no {CONFIG_FILE})", _other_folder(folder))
    elif not (folder / WEIGHTS_FILE).is_file():
        pickles = sorted(path.name for path in folder.glob("adapter_model.*"))
        if pickles:
            what = f"{folder} has its weights as a pickle ({', '.join(pickles)}), which can run code"
            cure = "Where you trust it: load it with peft, then save_pretrained, which writes safetensors."
            yield Problem(key, what, cure)
        else:
            yield Problem(key, f"{folder} has no {WEIGHTS_FILE}", "Copy or download the folder again.")


def _other_folder(folder: Path) -> str:
    """What to give instead of a folder that is no adapter."""
    results = [str(folder / name) for name in ("final", "best") if (folder / name / CONFIG_FILE).is_file()]
    if results:
        return f"It is a run; give its result: {' or '.join(results)}."
    if (folder / "MANIFEST.json").is_file():
        return "It is a checkpoint, which its own run goes on from: checkpoint.resume."
    if (folder / "config.json").is_file():
        return "It is a model: give it as model.path, and leave adapter.path out for a new adapter."
    return "Give the folder of an adapter, for example runs/first/final."


def _read(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cure = "Copy or download the folder again."
        raise ConfigError(Problem("adapter.path", f"{file} cannot be read: {error}", cure)) from error
    if not isinstance(values, dict):
        raise ConfigError(
            Problem("adapter.path", f"{file} is no adapter's config", "Copy or download it again.")
        )
    return values


def _not_kept(folder: Path, file: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each thing in the file that training would lose or change."""
    cure = f"Merge it: burnish merge {folder} OUT; then model.path: OUT with a new adapter."
    for what in _odd(file):
        yield Problem("adapter.path", f"{folder}: its {CONFIG_FILE} has {what}", cure)


def _odd(file: Mapping[str, Any]) -> Iterator[str]:
    if file.get("peft_type") != "LORA":
        yield f"peft_type {file.get('peft_type')}; only LORA is trained"
        return
    for key, fine in (("task_type", (None, "CAUSAL_LM")), ("bias", (None, "none"))):
        if file.get(key) not in fine:
            yield f"{key} {file[key]}; only {fine[1]} is trained"
    if file.get("init_lora_weights") not in _HARMLESS_INIT:
        yield f"init_lora_weights {file['init_lora_weights']}, which belongs to a changed base"
    if file.get("use_dora") and file.get("use_rslora"):
        yield "use_dora and use_rslora, which are not trained together"
    yield from _malformed(file)
    for key, value in file.items():
        if key not in _KEPT | _IDLE and value not in (None, False, "none", "", [], {}):
            yield f"{key}, which is not kept"


def _malformed(file: Mapping[str, Any]) -> Iterator[str]:
    rank, alpha, dropout = file.get("r"), file.get("lora_alpha"), file.get("lora_dropout", 0.0)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        yield f"r {rank!r}, which is no rank"
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or alpha <= 0:
        yield f"lora_alpha {alpha!r}, which is no scale"
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        yield f"lora_dropout {dropout!r}, which is no share"
    if not _targets(file):
        yield "targets that are no list of names"
    if not isinstance(file.get("exclude_modules") or [], list):
        yield "exclude_modules that are no list of names"
    if _tokens(file) is None:
        yield "trainable_token_indices that are not the same tokens in embedding and head"


def _targets(file: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of modules and weights, in order; None where they are no list of names."""
    names: list[str] = []
    for key in ("target_modules", "target_parameters"):
        value = file.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            return None
        names += value
    return tuple(sorted(names))


def _tokens(file: Mapping[str, Any]) -> frozenset[int] | None:
    """Tokens with trained rows; None where they differ between embedding and head."""
    found = file.get("trainable_token_indices") or []
    lists = list(found.values()) if isinstance(found, dict) else [found]
    if not all(
        isinstance(tokens, list) and all(type(t) is int and t >= 0 for t in tokens) for tokens in lists
    ):
        return None
    sets = {frozenset(tokens) for tokens in lists}
    return next(iter(sets)) if len(sets) == 1 else None


def _own(file: Mapping[str, Any]) -> dict[str, Any]:
    kind = "dora" if file.get("use_dora") else "rslora" if file.get("use_rslora") else "lora"
    return {
        "kind": kind,
        "rank": file["r"],
        "alpha": float(file["lora_alpha"]),
        "dropout": float(file.get("lora_dropout", 0.0)),
        "targets": _targets(file),
    }


def _contradictions(adapter: AdapterConfig, own: Mapping[str, Any]) -> Iterator[Problem]:
    """What the config sets otherwise; dropout it may."""
    for key in ("kind", "rank", "alpha", "targets"):
        if key not in adapter.model_fields_set:
            continue
        value, there = getattr(adapter, key), own[key]
        if key == "targets" and not isinstance(value, str):
            value = tuple(sorted(set(value)))
        if value != there:
            shown, true = _shown(value), _shown(there)
            what = f"is {shown}, but the adapter in adapter.path has {true}"
            yield Problem(f"adapter.{key}", what, "Leave it out: it is taken from the adapter.")


def _shown(value: Any) -> str:
    return f"[{first_few(value)}]" if isinstance(value, tuple) else str(value)


def _check_base(config: Config, file: Mapping[str, Any]) -> Iterator[Problem]:
    assert config.adapter is not None and config.adapter.path is not None
    folder, path = Path(config.adapter.path), config.model.path
    if config.model.init == "random":
        what = f"is {folder}, but model.init: random makes a base that it was not trained on"
        base = recorded_base(folder) or "its base"
        yield Problem("adapter.path", what, f"Leave model.init out, and set model.path: {base}.")
        return
    base = file.get("base_model_name_or_path")
    if base and _same_base(base, path) is False:
        cure = f"Set model.path: {base}. If both are the same model, correct base_model_name_or_path there."
        yield Problem("adapter.path", f"{folder} was trained on {base}, but model.path is {path}", cure)
    results = (Path(config.output_dir).resolve() / name for name in ("final", "best"))
    if folder.resolve() in (Path(config.output_dir).resolve(), *results):
        what = f"{config.output_dir} holds adapter.path ({folder})"
        cure = "The run would write over the adapter it starts from: give another folder."
        yield Problem("output_dir", what, cure)


def _same_base(recorded: str, path: str) -> bool | None:
    """Whether two names are of one model; None where that cannot be told: a folder against a hub name, or
    one that is not here."""
    if recorded == path:
        return True
    first, second = Path(recorded).expanduser(), Path(path).expanduser()
    if first.is_dir() and second.is_dir():
        return first.resolve() == second.resolve()
    if first.is_dir() or second.is_dir() or not (_HUB_NAME.fullmatch(recorded) and _HUB_NAME.fullmatch(path)):
        return None
    return recorded.lower() == path.lower()
