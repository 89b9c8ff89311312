"""Rows and files of rows for tests of what is wrong with them."""

import json
from pathlib import Path

from tokenizers_on_the_spot import byte_level

from burnish.config.schema import Config
from burnish.data.prepare import PreparedData, prepare
from burnish.data.tokenizer import builtin_templates

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, ANSWER]}
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    + builtin_templates()["chatml"]
)


TOKENIZER = byte_level(["<|im_start|>", "<|im_end|>"])


def said(*contents, role: str = "assistant") -> dict:
    return {"messages": [USER, *({"role": role, "content": content} for content in contents)]}


def line(row) -> bytes:
    return json.dumps(row).encode()


def run(folder: Path, *rows: bytes | dict, suffix: str = "jsonl", num_good: int = 3, **data) -> PreparedData:
    path = folder / f"rows.{suffix}"
    written = [row if isinstance(row, bytes) else line(row) for row in (*rows, *[GOOD] * num_good)]
    path.write_bytes(b"\n".join(written))
    return run_file(path, **data)


def run_file(*paths: Path, **data) -> PreparedData:
    keys = {"max_tokens": 512, "max_bad_fraction": 1.0, "cache_dir": str(paths[0].parent / "cache"), **data}
    config = Config.model_validate(
        {
            "model": {"path": "m"},
            "output_dir": "out",
            "data": {"train": [str(path) for path in paths], **keys},
        }
    )
    return prepare(config, TOKENIZER, REFUSES_SYSTEM)
