"""`burnish eval`: the training loop's own evaluation, on a finished model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.config.adapter_file import tokenizer_place
from burnish.config.check import check_source, require_model
from burnish.config.load import load_config
from burnish.config.schema import Config, SourceConfig
from burnish.errors import ConfigError, Problem
from burnish.records import EvalStats, Vocabulary
from burnish.runtime import log

if TYPE_CHECKING:
    from burnish.data.prepare import PreparedData
    from burnish.data.store import ExampleStore

_EVERY_ROW = {"eval": None, "eval_fraction": 0.0, "mix": "concat"}
"""Keys of `data` with which every row of `data.train` is evaluated, and none held out."""


def score(target: Sequence[str], data: Sequence[str], as_json: bool) -> str:
    """Evaluate a config's result, or a model folder, and say which model that was and how it did.

    Args:
        target: A config file or a model (folder or hub name), then dotted flags.
        data: Files to evaluate on; none for what the config's training evaluates on: `data.eval`, or the
            rows that `data.eval_fraction` holds out.
        as_json: One line as in metrics.jsonl, and `model`. `step` is the number of steps that the model
            was trained, as its folder says, or null.

    Raises:
        ConfigError: The config has no result yet, or there is nothing to evaluate on.
    """
    from burnish.export.card import trained_steps
    from burnish.metrics.lines import eval_line, to_json

    with tempfile.TemporaryDirectory(prefix="burnish-eval-") as scratch:
        config = _config(target, data, scratch)
        stats = evaluate_model(config)
    if as_json:
        path = config.model.path
        line = to_json({**eval_line(stats), "step": trained_steps(path), "model": path})
        return json.dumps(json.loads(line))  # in ASCII, which every terminal and pipe can be given
    lines = [f"model: {config.model.path}", f"{'source':<32} {'loss':>10} {'perplexity':>12} {'tokens':>12}"]
    for name, numbers in stats.sources.items():
        lines.append(_line(name, numbers))
    if len(stats.sources) > 1:
        whole = {
            "loss": stats.loss,
            "perplexity": stats.perplexity,
            "num_supervised_tokens": stats.num_supervised_tokens,
        }
        lines.append(_line("all", whole))
    return "\n".join(lines)


def evaluate_model(config: Config) -> EvalStats:
    """Token-weighted loss of `model.path` (a model or an adapter) on the examples that the config holds
    out, or on all of `data.train`'s where it holds out none.

    Raises:
        ConfigError: `data.eval_fraction` is set, but there are too few rows that differ to hold one out.
    """
    from burnish.data.prepare import prepare
    from burnish.data.tokenizer import load_tokenizer, padding_id, vocabulary_of
    from burnish.data.vocabulary import require_rows
    from burnish.data.windows import eval_cuts
    from burnish.engine.build import COMPUTE_DTYPES
    from burnish.engine.local import LocalScorer
    from burnish.host_memory import bound_kernel_caches
    from burnish.model.attention import asked, can_isolate
    from burnish.model.forward import SupervisedModel
    from burnish.runtime import Ranks, pick_device
    from burnish.train.evaluate import evaluate

    ranks = Ranks(0, 0, 1)
    device = pick_device(ranks)
    bound_kernel_caches(device)
    tokenizer, template = load_tokenizer(config.model, config.data)
    store = _evaluated(config, prepare(config, tokenizer, template))
    vocabulary = vocabulary_of(tokenizer, config.model)
    model = _load(config, vocabulary)
    require_rows(tokenizer, _num_rows(model), [store])
    capability = can_isolate(model, *asked(config))
    model = SupervisedModel(model, capability)
    scorer = LocalScorer(model, device=device, compute_dtype=COMPUTE_DTYPES[config.model.dtype])
    cuts = eval_cuts(store, config.batch, 1, capability.packed)
    pad = padding_id(tokenizer)
    return evaluate(scorer, store, cuts, ranks, step=0, packed=capability.packed, pad_token_id=pad)


def _evaluated(config: Config, data: PreparedData) -> ExampleStore:
    """The examples to evaluate on; a warning where training may have seen some of them."""
    if config.data.eval_fraction == 0.0:
        return data.train
    if data.eval is None:
        cure = "Give --data FILE, or set data.eval."
        what = "holds out nothing: there is one example, or all come from equal rows"
        raise ConfigError(Problem("data.eval_fraction", what, cure))
    if data.fingerprint != _trained_on(config):
        log.warning(
            "The data, or a key that decides what becomes of it, is not as it was when %s was trained: "
            "some of the rows held out now may have been trained on.",
            config.model.path,
        )
    return data.eval


def _trained_on(config: Config) -> str | None:
    """The fingerprint of the data that the run in `output_dir` was trained on, if it left one."""
    from burnish.data.stamp import REPORT_FILE

    try:
        return json.loads((Path(config.output_dir) / REPORT_FILE).read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _num_rows(model: Any) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _load(config: Config, vocabulary: Vocabulary) -> Any:
    """The model, or the adapter merged into its base (exact enough to measure: fp32)."""
    import torch

    if (Path(config.model.path) / "adapter_config.json").is_file():
        from burnish.model.finished import load_finished

        try:
            adapted: Any = load_finished(config.model.path, torch.float32)
        except (OSError, ValueError) as error:
            what = f"{config.model.path} cannot be loaded: {str(error).strip().splitlines()[0]}"
            raise ConfigError(Problem("model.path", what, "Mend the folder, or its base's.")) from error
        return adapted.merge_and_unload()
    from burnish.model.load import load_model

    return load_model(
        config.model,
        seed=0,
        init_context=None,
        param_dtype=torch.float32,
        vocabulary=vocabulary,
    )


def _config(target: Sequence[str], data: Sequence[str], scratch: str) -> Config:
    """One process; `data.train` holds what is evaluated, every row of it, or what rows are held out of."""
    if not target or target[0].startswith("-"):
        raise ConfigError(
            Problem("CONFIG or MODEL", "is missing", "burnish eval runs/first/final --data d.jsonl")
        )
    first, flags = target[0], list(target[1:])
    is_file = Path(first).is_file() or _is_missing_config(Path(first))
    base = load_config(Path(first), flags) if is_file else _config_of_model(first, flags, data, scratch)
    model = base.model
    if is_file:
        result = {"path": str(_result_of(base, first)), "tokenizer": None, "init": "pretrained"}
        model = model.model_copy(update=result)
    changed = {
        "model": model,
        "adapter": None,
        "data": base.data.model_copy(update=_eval_data(base, data) if is_file else _EVERY_ROW),
        # A template that stamps dates goes on with that of the run, however it was begun.
        "checkpoint": base.checkpoint.model_copy(update={"resume": "auto"}),
        "engine": base.engine.model_copy(update={"kind": "local", "sequence_parallel": 1}),
    }
    return base.model_copy(update=changed)


def _is_missing_config(path: Path) -> bool:
    """Whether it can only be a config whose name is wrong: `load_config` knows what to say of it."""
    return path.suffix in (".yaml", ".yml", ".json") and not path.exists()


def _result_of(config: Config, file: str) -> Path:
    """The config's `final/`. Its starting model is no stand-in: the numbers of a model that was not
    trained would look like a result."""
    final = Path(config.output_dir) / "final"
    if not final.is_dir():
        cure = f"Train first: burnish train {file}; or name a model: burnish eval MODEL --data FILE."
        raise ConfigError(Problem("output_dir", f"there is no result in it, no folder {final}", cure))
    return final


def _config_of_model(path: str, flags: list[str], data: Sequence[str], scratch: str) -> Config:
    require_model(path)
    if not data:
        raise ConfigError(_no_data(path))
    _require_files(data)
    sources = json.dumps(list(data))  # JSON is YAML too, and takes every name
    config = load_config(
        None, ["--model.path", "a/b", "--data.train", sources, f"--output_dir={scratch}/run", *flags]
    )
    tokenizer = config.model.tokenizer or tokenizer_place(path)
    changed = {"path": path, "tokenizer": tokenizer if tokenizer != path else None}
    return config.model_copy(update={"model": config.model.model_copy(update=changed)})


def _require_files(data: Sequence[str]) -> None:
    problems = [problem for path in data for problem in check_source("--data", SourceConfig(path=path))]
    if problems:
        raise ConfigError(*problems)


def _no_data(path: str) -> Problem:
    if Path(path).exists():
        return Problem("--data", "is missing", "Say what to evaluate on: --data held-out.jsonl")
    cure = "Give a config, or a model (folder or hub name) and --data held-out.jsonl."
    return Problem(path, "there is no such file or folder; for a model on the hub --data is missing", cure)


def _eval_data(config: Config, data: Sequence[str]) -> dict[str, Any]:
    """Keys of `data` with which the config's evaluation data is prepared."""
    if data:
        _require_files(data)
        return {**_EVERY_ROW, "train": tuple(SourceConfig(path=path) for path in data)}
    if config.data.eval is not None:
        return {**_EVERY_ROW, "train": config.data.eval}
    if config.data.eval_fraction > 0:
        return {}  # as training prepares it, so that the split is training's
    cure = "Give --data FILE, or set data.eval or data.eval_fraction as they were in training."
    raise ConfigError(Problem("data.eval", "is not set, and data.eval_fraction neither", cure))


def _line(name: str, numbers: Mapping[str, float | int]) -> str:
    loss, perplexity, num_tokens = (numbers[key] for key in ("loss", "perplexity", "num_supervised_tokens"))
    return f"{name:<32} {loss:>10.4f} {perplexity:>12.4f} {num_tokens:>12,}"
