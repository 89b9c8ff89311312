"""What is raced: models, data sets, and the windows that everybody consumes in the same order."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.config.schema import Config
from burnish.data.store import ExampleStore
from burnish.data.windows import WindowPlan, plan_windows
from burnish.plan.shapes import ModelShape
from burnish.records import Example

NUM_WINDOWS = 50
"""Optimizer steps that there is data for: those of the loss curve, and more than a race takes."""
DOCUMENTS_FILE = "documents.npz"
CASE_FILE = "case.json"
MODEL_FOLDER = "model"

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_parameters": _ROPE,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_parameters": _ROPE,
    },
    "qwen": {
        **_QWEN,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "qwen-0.5b": {
        **_QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "qwen-1.5b": {
        **_QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}
LORA = {"kind": "lora", "rank": 64, "alpha": 128.0}


def python_path() -> str:
    """Where child processes find `step` and Burnish, before whatever this one was told."""
    root = Path(__file__).parents[2]
    told = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(root / "bench"), str(root / "src"), *([told] if told else [])])


@dataclass(frozen=True)
class Case:
    """One table: a model, what of it is trained, and a data set."""

    model: str
    data: str
    lora: bool = False
    examples_per_step: int = 8
    all_peers: bool = False
    """Race every peer; else those that were near, so that all cases together end within half an hour."""
    micro_tokens: int | None = None
    """Of our forwards, as `auto` gives it on the GPU that the case is for; None is the default on a CPU."""
    crowded: bool = False
    """On a GPU only Burnish and TRL race: everybody's weights and optimizer are on it all the time, 12 bytes
    a parameter, and those of more do not fit into 80 GB beside a step."""

    @property
    def name(self) -> str:
        """As `--case` takes it."""
        return f"{self.model}{'-lora' if self.lora else ''}/{self.data}"


def alpaca(rows: Sequence[Example]) -> list[Example]:
    """The rows as they are: f about 0.88."""
    return list(rows)


def long_prompts(rows: Sequence[Example]) -> list[Example]:
    """The same documents, of which only the last 30 % are answer."""
    short = []
    for row in rows:
        weights = np.zeros(len(row.token_ids), np.float32)
        weights[-max(1, round(0.3 * len(weights))) :] = 1.0
        short.append(Example(row.source, row.row, row.token_ids, weights))
    return short


def multi_turn(rows: Sequence[Example]) -> list[Example]:
    """Conversations of several of the rows, one after the other: about 900 tokens."""
    mean = np.mean([len(row.token_ids) for row in rows])
    rng = random.Random(3)
    talks, left = [], list(rows)
    while left:
        turns = min(len(left), max(1, round(rng.gauss(900 / mean, 1))))
        talk, left = left[:turns], left[turns:]
        ids = np.concatenate([row.token_ids for row in talk])
        weights = np.concatenate([row.weights for row in talk])
        talks.append(Example("rows", talk[0].row, ids[:2048], weights[:2048]))
    return talks


def one_length(rows: Sequence[Example], length: int = 256) -> list[Example]:
    """The rows' tokens cut into documents of one length: nothing is gained by not padding."""
    ids = np.concatenate([row.token_ids for row in rows])
    weights = np.concatenate([row.weights for row in rows])
    starts = range(0, len(ids) - length + 1, length)
    return [Example("rows", f"{s}", ids[s : s + length], weights[s : s + length]) for s in starts]


def documents(rows: Sequence[Example]) -> list[Example]:
    """The rows' tokens in documents of 2,048: peers that take one at a time get the same attention kernel."""
    return one_length(rows, 2048)


DATA = {
    "alpaca": alpaca,
    "long-prompts": long_prompts,
    "multi-turn": multi_turn,
    "one-length": one_length,
    "documents": documents,
}

CASES = (
    Case("llama", "alpaca", all_peers=True),
    Case("llama", "long-prompts", all_peers=True),
    Case("llama", "multi-turn", examples_per_step=4),
    Case("llama", "one-length"),
    Case("qwen", "alpaca"),
    Case("qwen", "long-prompts"),
    Case("llama", "alpaca", lora=True),
)
GPU_CASES = (
    Case("qwen-0.5b", "documents", examples_per_step=4, micro_tokens=8192),
    Case("qwen-0.5b", "documents", lora=True, examples_per_step=4, micro_tokens=8192),
    Case("qwen-1.5b", "documents", examples_per_step=4, micro_tokens=4096, crowded=True),
)
"""Only where they are asked for by name."""
QUICK = ("llama/alpaca",)


def write_case(case: Case, rows: Sequence[Example], folder: Path, seed: int = 0) -> None:
    """Put what every racer needs into a folder: weights, documents in the order of the steps."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = MODELS[case.model]
    examples = [
        Example(e.source, e.row, (e.token_ids % keys["vocab_size"]).astype(np.int32), e.weights)
        for e in DATA[case.data](rows)
        if (e.weights[1:] > 0).any()
    ]
    num = NUM_WINDOWS * case.examples_per_step
    examples = [examples[i % len(examples)] for i in range(num)]
    np.savez(
        folder / DOCUMENTS_FILE,
        ids=np.concatenate([e.token_ids for e in examples]),
        weights=np.concatenate([e.weights for e in examples]),
        lengths=np.array([len(e.token_ids) for e in examples]),
    )
    (folder / CASE_FILE).write_text(json.dumps(asdict(case)))
    model_folder = folder / MODEL_FOLDER
    model_folder.mkdir()
    (model_folder / "config.json").write_text(json.dumps(keys))
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    model.to(torch.bfloat16).float().save_pretrained(model_folder)  # weights that bf16 holds exactly


@dataclass(frozen=True)
class Race:
    """A case as read back by one racer."""

    case: Case
    folder: Path
    store: ExampleStore
    windows: WindowPlan
    config: Config

    @property
    def model_folder(self) -> Path:
        """Weights and config.json."""
        return self.folder / MODEL_FOLDER

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return ModelShape.from_config_json(MODELS[self.case.model])

    def documents(self, step: int) -> list[Example]:
        """The documents of an optimizer step, from 1."""
        return [self.store[int(i)] for i in self.windows.example_ids(step)]


def read_race(folder: Path, dtype: str = "bf16") -> Race:
    """What `write_case` wrote, with the steps planned as `burnish train` plans them."""
    case = Case(**json.loads((folder / CASE_FILE).read_text()))
    arrays = np.load(folder / DOCUMENTS_FILE)
    ends = np.cumsum(arrays["lengths"])
    ids, weights = (np.split(arrays[name], ends[:-1]) for name in ("ids", "weights"))
    examples = [Example("rows", str(i), ids[i], weights[i]) for i in range(len(ids))]
    config = Config.model_validate(
        {
            "model": {"path": str(folder / MODEL_FOLDER), "dtype": dtype},
            "adapter": LORA if case.lora else None,
            "data": {"train": "rows", "max_tokens": 4096},
            "batch": {
                "global_examples": case.examples_per_step,
                "micro_tokens": case.micro_tokens or "auto",
            },
            "optim": {"lr": 1e-4},
            "engine": {"kind": "local"},
            "output_dir": str(folder / "run"),
        }
    )
    store = ExampleStore.from_examples(examples)
    cost = ModelShape.from_config_json(MODELS[case.model]).cost_model()
    windows = plan_windows(store, config.data, config.batch, config.train, 1, True, cost)
    return Race(case, folder, store, windows, config)
