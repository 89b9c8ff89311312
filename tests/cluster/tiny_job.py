"""The smallest job that `burnish train` takes: a model folder, a tokenizer, conversations, a config."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TESTS = Path(__file__).resolve().parent.parent
NUM_STEPS = 4
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]),
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""What a program started by a test needs besides what its launcher sets."""


def write_tiny_job(folder: Path) -> Path:
    """Write everything into `folder`; returns the config's path."""
    model = folder / "model"
    model.mkdir(parents=True)
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = ["<|im_start|>", "<|im_end|>", "<pad>"]
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>"
    ).save_pretrained(model)
    architecture = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary) + len(control),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    (model / "config.json").write_text(json.dumps(architecture))
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} and {i + 3}?"},
                {"role": "assistant", "content": f"It is {2 * i + 3}." + " Indeed!" * (i % 5)},
            ]
        }
        for i in range(24)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"path": str(model), "init": "random", "dtype": "fp32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "chat_template": "chatml",
            "max_tokens": 192,
            "cache_dir": str(folder / "cache"),
            "num_workers": 1,
        },
        "batch": {"global_examples": 6, "micro_tokens": 256},
        "optim": {"lr": 0.01},
        "train": {"max_steps": NUM_STEPS},
        "checkpoint": {"resume": "never"},
        "log": {"trackers": []},
        "output_dir": str(folder / "run"),
    }
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def losses(run_dir: Path) -> list[float]:
    """The training loss of every step, as logged."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]
