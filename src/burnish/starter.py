"""A first config for somebody's data: every line that is likely to change, with its reason."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from burnish.config.check import check_config
from burnish.config.schema import Config, SourceConfig
from burnish.config.yaml_text import write_yaml
from burnish.errors import ConfigError, DataError, Problem, writing

PEEK_ROWS = 200
_CHARS_PER_TOKEN = 3.5
"""Rough, for English; only used to propose `data.max_tokens`."""
_CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
_ROOMS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def write_config(data: Sequence[str], model: str, out: Path, force: bool) -> Iterator[str]:
    """Write a config for the data and say what was found, line by line.

    Raises:
        ConfigError: No data was named, it is not there, or `out` exists.
        DataError: Its format cannot be told.
        MachineError: `out` cannot be written.
    """
    if not data:
        raise ConfigError(Problem("DATA", "is missing", "burnish init train.jsonl --model MODEL"))
    with writing(out):
        is_there = out.exists()  # a folder that may not be searched raises too
    if is_there and not force:
        raise ConfigError(Problem(str(out), "is there already", "Give --out another name, or --force."))
    longest = 0
    for path in data:
        found, num_chars = _look_at(path)
        longest = max(longest, num_chars)
        yield f"{path}: {found}"
    max_tokens = _room_for(longest)
    text = _text(data, model, max_tokens, Path("runs") / out.stem)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    yield f"Wrote {out}. Next:"
    if model == "MODEL":
        yield f"  set model.path in {out}"
    yield f"  burnish check {out}"
    yield f"  burnish train {out}"


def _look_at(path: str) -> tuple[str, int]:
    """What the first rows are, in words, and the length of the longest."""
    from burnish.data.format import detect_format
    from burnish.data.load import read_rows

    source = SourceConfig(path=path)
    config = Config.model_validate(
        {"model": {"path": "a/b"}, "data": {"train": path}, "output_dir": "runs/a"}
    )
    problems = [p for p in check_config(config) if p.where.startswith("data")]
    if problems:
        raise ConfigError(*problems)
    rows = [row.value for row in itertools.islice(read_rows(source), PEEK_ROWS) if row.value is not None]
    if not rows:
        raise DataError(Problem(path, "there is no readable row in it", "Is it the right file?"))
    found = detect_format(source, rows)
    num_chars = max(len(json.dumps(row, default=str, ensure_ascii=False)) for row in rows)
    return f"{found.name} rows, the longest of the first {len(rows)} has {num_chars:,} characters", num_chars


def _room_for(num_chars: int) -> int:
    needed = num_chars / _CHARS_PER_TOKEN
    return next((room for room in _ROOMS if room >= needed), _ROOMS[-1])


def _template_line(model: str) -> str:
    if _lacks_template(model):
        return "  chat_template: chatml        # its tokenizer has none"
    return "  # chat_template: chatml      # for a base model whose tokenizer has none, with add_tokens above"


def _tokens_line(model: str) -> str:
    tokens = f"add_tokens: {json.dumps(_CHATML_TOKENS)}"
    return f"  {tokens}   # chatml's" if _lacks_template(model) else f"  # {tokens}"


def _lacks_template(model: str) -> bool:
    """Whether the tokenizer in a folder has no chat template; False where that cannot be seen."""
    folder = Path(model)
    settings = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file():
        return False
    if any(folder.glob("chat_template.*")) or (folder / "additional_chat_templates").is_dir():
        return False
    try:
        found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except (OSError, ValueError):
        return False  # `check` says what is wrong with it
    return not found.get("chat_template")


def _text(data: Sequence[str], model: str, max_tokens: int, output_dir: Path) -> str:
    def value(text: str) -> str:
        return write_yaml({"x": text}).removeprefix("x:").rstrip("\n")

    # JSON is YAML too, and keeps a list of odd names on one line.
    train = value(data[0]) if len(data) == 1 else f" {json.dumps(list(data), ensure_ascii=False)}"
    return f"""\
# Written by `burnish init`. Every key: `burnish train --help-all`; for an editor: `burnish schema`.
model:
  path:{value(model)}
  dtype: bf16                  # bf16 | fp16 | fp32: what the forward runs in
{_tokens_line(model)}
  # activation_checkpointing: full   # less memory, about a third slower

# A small adapter instead of all weights: remove the # of the next three lines.
# adapter:
#   rank: 64
#   alpha: 128                 # quantize: nf4 below makes it QLoRA

data:
  train:{train}
  eval_fraction: 0.02          # held out for evaluation; or data.eval: FILE
  max_tokens: {max_tokens:<16} # longer examples are cut; `burnish check` counts them
{_template_line(model)}

batch:
  global_examples: 32          # per optimizer step, over all GPUs; how it is cut never changes the result

optim:
  lr: 1.0e-5                   # about 2e-4 for an adapter

train:
  epochs: 2

eval:
  every_steps: 50

checkpoint:
  every_steps: 100             # the same command goes on from the newest whole one

output_dir:{value(str(output_dir))}
"""
