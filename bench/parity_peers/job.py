"""What all sides get: one tiny model, one adapter, one set of rows, of hyperparameters; and our runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from burnish.data.windows import order
from burnish.metrics.lines import read_lines

Lengths = Literal["equal", "mixed"]

GLOBAL_EXAMPLES = 8
MICRO_EXAMPLES = 4
"""Of the peers. Ours cuts a step by tokens (MICRO_TOKENS), so its micro-batches are others."""
MICRO_TOKENS = 512
MAX_TOKENS = 384
NUM_EVAL = 10
LR, BETAS, EPS, DECAY, CLIP = 2e-3, (0.9, 0.95), 1e-8, 0.01, 1.0
WARMUP_RATIO, MIN_LR_RATIO = 0.1, 0.1
SEED = 7
RANK, ALPHA = 8, 16
EQUAL_LEARNED = 40
"""Learned tokens of every example of the `equal` rows, the end of turn included."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One way to train, for all sides."""

    lora: bool
    dtype: Literal["fp32", "bf16"]
    lengths: Lengths

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{'lora' if self.lora else 'full'}-{self.dtype}-{self.lengths}"

    def with_lora(self) -> Setting:
        """The same, of an adapter."""
        return replace(self, lora=True)


PLAIN = Setting(lora=False, dtype="fp32", lengths="mixed")
"""What is also compared in other respects: packed, with its data, evaluated."""


@dataclass(frozen=True)
class Job:
    """Everything on disk that a comparison needs."""

    folder: Path
    num_steps: int

    @property
    def model(self) -> Path:
        """Weights, tokenizer and template."""
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        """The LoRA weights that both sides start from, as peft saves them."""
        return self.folder / "adapter"

    @property
    def evaluation(self) -> Path:
        """Held-out rows, of mixed lengths."""
        return self.folder / "eval.jsonl"

    def rows(self, lengths: Lengths) -> Path:
        """Training rows as ours reads them."""
        return self.folder / f"{lengths}.jsonl"

    def in_our_order(self, lengths: Lengths) -> list[Row]:
        """The same rows in the order in which ours consumes them."""
        rows = read_rows(self.rows(lengths))
        return [rows[i] for i in order(SEED, 0, len(rows))]


def make_job(folder: Path, rows: Sequence[Mapping[str, str]], tokenizer: Any, num_steps: int) -> Job:
    """Write model, adapter and rows.

    Args:
        folder: Empty or new.
        rows: Alpaca's columns; more than the comparison takes, since some are too long.
        tokenizer: ChatML's, with `{% generation %}` marks in its template, which TRL needs.
        num_steps: Optimizer steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder, num_steps)
    chats = [chat for row in rows if len(learned_and_all(chat := as_chat(row), tokenizer)[1]) <= MAX_TOKENS]
    num = num_steps * GLOBAL_EXAMPLES
    held_out, mixed = chats[:NUM_EVAL], chats[NUM_EVAL : NUM_EVAL + num]
    equal = [cut for chat in chats if (cut := of_equal_length(chat, tokenizer)) is not None][:num]
    if len(mixed) < num or len(equal) < num:
        raise SystemExit(f"{num} rows are needed, {len(mixed)} fit and {len(equal)} are long enough")
    write_rows(job.evaluation, held_out)
    write_rows(job.rows("mixed"), mixed)
    write_rows(job.rows("equal"), equal)
    _make_model(job, tokenizer)
    _make_adapter(job)
    return job


def as_chat(row: Mapping[str, str]) -> Row:
    """A row of Alpaca's columns as two messages."""
    ask = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": row["output"]}]}


def learned_and_all(chat: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the answer, and of the whole."""
    answer = chat["messages"][-1]["content"]
    text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
    encode = lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]  # noqa: E731
    return encode(answer), encode(text)


def of_equal_length(chat: Row, tokenizer: Any) -> Row | None:
    """The row with its answer cut to EQUAL_LEARNED learned tokens; None where that cannot be done."""
    question, answer = chat["messages"]
    encoded = tokenizer(answer["content"], add_special_tokens=False, return_offsets_mapping=True)
    if len(encoded["input_ids"]) < EQUAL_LEARNED:
        return None
    end = encoded["offset_mapping"][EQUAL_LEARNED - 2][1]
    cut = {"messages": [question, {**answer, "content": answer["content"][:end]}]}
    # Cut texts may be tokenised in another way; those rows are left out.
    return cut if len(learned_and_all(cut, tokenizer)[0]) == EQUAL_LEARNED - 1 else None


def _make_model(job: Job, tokenizer: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # About 1/sqrt(hidden): a model so narrow hardly learns within 50 steps from the usual 0.02.
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(job.model)
    tokenizer.save_pretrained(job.model)


def _make_adapter(job: Job) -> None:
    """The adapter that a run of ours starts from: it is a function of `train.seed`."""
    from transformers import AutoModelForCausalLM

    from burnish.config.schema import Config
    from burnish.model.adapt import adapt

    config = Config.model_validate(our_config(job, PLAIN.with_lora(), job.folder / "unused"))
    model = AutoModelForCausalLM.from_pretrained(job.model)
    adapted: Any = adapt(model, config.adapter, "none", seed=config.train.seed)
    adapted.save_pretrained(job.adapter)


def our_config(job: Job, setting: Setting, out: Path) -> dict[str, Any]:
    """The config of a run of ours, as a user would write it."""
    config: dict[str, Any] = {
        "model": {"path": str(job.model), "dtype": setting.dtype},
        "data": {
            "train": str(job.rows(setting.lengths)),
            "eval": str(job.evaluation),
            "max_tokens": MAX_TOKENS,
        },
        "batch": {"global_examples": GLOBAL_EXAMPLES, "micro_tokens": MICRO_TOKENS},
        "optim": {
            "lr": LR,
            "betas": list(BETAS),
            "eps": EPS,
            "weight_decay": DECAY,
            "max_grad_norm": CLIP,
        },
        "schedule": {"name": "cosine", "warmup_ratio": WARMUP_RATIO, "min_lr_ratio": MIN_LR_RATIO},
        "train": {"epochs": 1, "seed": SEED},
        "engine": {"kind": "local"},
        "launch": {"num_processes": 1},
        "log": {"trackers": []},
        "output_dir": str(out),
    }
    if setting.lora:
        config["adapter"] = {"kind": "lora", "rank": RANK, "alpha": ALPHA, "targets": "all-linear"}
    return config


def train_ours(job: Job, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`burnish train CONFIG` in a process of its own; its curve, read from metrics.jsonl."""
    lines = train_lines(config, job.folder / f"{name}.yaml")
    steps = [line for line in lines if line["kind"] == "train"]
    if [line["num_examples"] for line in steps] != [GLOBAL_EXAMPLES] * job.num_steps:
        raise RuntimeError(f"{name}: not {job.num_steps} steps of {GLOBAL_EXAMPLES} examples")
    curve = {
        name: [line[name] for line in steps] for name in ("loss", "lr", "grad_norm", "num_micro_batches")
    }
    evals = [line["loss"] for line in lines if line["kind"] == "eval"]
    return {**curve, "eval_loss": evals, "final": Path(config["output_dir"]) / "final"}


def train_lines(config: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    """The lines that `burnish train` wrote."""
    run([sys.executable, "-m", "burnish", "train", str(write_config(file, config))])
    return list(read_lines(Path(config["output_dir"]) / "metrics.jsonl"))


def view_ours(config: Mapping[str, Any], file: Path, num: int) -> list[dict[str, Any]]:
    """`burnish view --json`: token ids, texts and what is learned, row by row."""
    write_config(file, config)
    command = [sys.executable, "-m", "burnish", "view", str(file), "--json", "-n", str(num)]
    found = [json.loads(line) for line in run(command).splitlines()]
    found.sort(key=lambda one: int(one["row"].rsplit(":", 1)[1]))
    return [
        {
            "ids": [token["id"] for token in one["tokens"]],
            "learned": [token["trained"] for token in one["tokens"]],
            "texts": [token["text"] for token in one["tokens"]],
        }
        for one in found
    ]


def write_config(file: Path, values: Mapping[str, Any]) -> Path:
    """As YAML, which JSON is."""
    file.write_text(json.dumps(values, indent=1), "utf-8")
    return file


def run(command: Sequence[str]) -> str:
    """Run a process without network and with quiet libraries; its stdout.

    Raises:
        RuntimeError: It failed; the end of its output is in the message.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    quiet |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **quiet})
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read_rows(path: Path) -> list[Row]:
    """JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
