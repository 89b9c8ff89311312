"""`burnish eval`: the training loop's own evaluation, on a finished model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish.config.load import load_config
from burnish.config.schema import Config
from burnish.errors import ConfigError, Problem
from burnish.records import EvalStats, Vocabulary


def score(target: Sequence[str], data: Sequence[str], as_json: bool) -> str:
    """Evaluate a config's result, or a model folder, and say which model that was and how it did.

    Args:
        target: A config file or a model (folder or hub name), then dotted flags.
        data: Files to evaluate on; none for the config's `data.eval`.
        as_json: One line as in metrics.jsonl, and `model`.

    Raises:
        ConfigError: The config has no result yet, or there is nothing to evaluate on.
    """
    from burnish.metrics.lines import eval_line, to_json

    with tempfile.TemporaryDirectory(prefix="burnish-eval-") as scratch:
        config = _config(target, data, scratch)
        stats = evaluate_model(config)
    if as_json:
        return to_json({**eval_line(stats), "model": config.model.path})
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
    """Token-weighted loss of `model.path` (a model or an adapter) on `data.train`'s examples."""
    from burnish.data.prepare import prepare
    from burnish.data.tokenizer import load_tokenizer, vocabulary_of
    from burnish.data.vocabulary import require_rows
    from burnish.data.windows import eval_cuts
    from burnish.engine.build import COMPUTE_DTYPES
    from burnish.engine.local import LocalScorer
    from burnish.model.attention import asked, can_isolate
    from burnish.model.forward import SupervisedModel
    from burnish.runtime import Ranks, pick_device
    from burnish.train.evaluate import evaluate

    ranks = Ranks(0, 0, 1)
    device = pick_device(ranks)
    tokenizer, template = load_tokenizer(config.model, config.data)
    store = prepare(config, tokenizer, template).train
    vocabulary = vocabulary_of(tokenizer, config.model)
    model = _load(config, vocabulary)
    require_rows(tokenizer, _num_rows(model), [store])
    capability = can_isolate(model, *asked(config))
    model = SupervisedModel(model, capability)
    scorer = LocalScorer(model, device=device, compute_dtype=COMPUTE_DTYPES[config.model.dtype])
    cuts = eval_cuts(store, config.batch, 1, capability.packed)
    pad: Any = tokenizer.pad_token_id
    return evaluate(scorer, store, cuts, ranks, step=0, packed=capability.packed, pad_token_id=pad or 0)


def _num_rows(model: Any) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _load(config: Config, vocabulary: Vocabulary) -> Any:
    """The model, or the adapter merged into its base (exact enough to measure: fp32)."""
    import torch

    if (Path(config.model.path) / "adapter_config.json").is_file():
        from burnish.model.finished import load_finished

        adapted: Any = load_finished(config.model.path, torch.float32)
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
    """One process, `data.train` holding what is evaluated, every row of it."""
    if not target or target[0].startswith("-"):
        raise ConfigError(
            Problem("CONFIG or MODEL", "is missing", "burnish eval runs/first/final --data d.jsonl")
        )
    first, flags = target[0], list(target[1:])
    is_file = Path(first).is_file() or _is_missing_config(Path(first))
    base = load_config(Path(first), flags) if is_file else _config_of_model(first, flags, data, scratch)
    sources = base.data.train if not is_file else _eval_sources(base, data)
    model = base.model
    if is_file:
        result = {"path": str(_result_of(base, first)), "tokenizer": None, "init": "pretrained"}
        model = model.model_copy(update=result)
    changed = {
        "model": model,
        "adapter": None,
        "data": base.data.model_copy(
            update={"train": sources, "eval": None, "eval_fraction": 0.0, "mix": "concat"}
        ),
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
    if not data:
        raise ConfigError(Problem("--data", "is missing", "Say what to evaluate on: --data held-out.jsonl"))
    sources = "[" + ", ".join(f'"{name}"' for name in data) + "]"
    config = load_config(
        None, ["--model.path", "a/b", "--data.train", sources, f"--output_dir={scratch}/run", *flags]
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def _eval_sources(config: Config, data: Sequence[str]) -> Any:
    from burnish.config.schema import SourceConfig

    if data:
        return tuple(SourceConfig(path=path) for path in data)
    if config.data.eval is None:
        cure = "Give --data FILE, or set data.eval."
        raise ConfigError(Problem("data.eval", "is not set", cure))
    return config.data.eval


def _line(name: str, numbers: Any) -> str:
    import math

    perplexity = math.exp(numbers["loss"]) if numbers["loss"] < 700 else float("inf")
    tokens = numbers.get("num_supervised_tokens")
    count = "" if tokens is None else f"{int(tokens):,}"
    return f"{name:<32} {numbers['loss']:>10.4f} {perplexity:>12.4f} {count:>12}"
