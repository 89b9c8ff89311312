"""TRL's own SFTTrainer, in a process of its own.

    python trl_run.py train JOB.json
    python trl_run.py examples JOB.json          its preparation of a data set alone, on rows

Nothing of TRL is replaced. With LoRA it is given the adapter that ours starts from, as a peft model.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run one job and write its result to the path that the job names."""
    mode, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    result = train(job) if mode == "train" else examples(job)
    packages = ("trl", "transformers", "peft", "torch", "accelerate")
    result["versions"] = {name: importlib.metadata.version(name) for name in packages}
    Path(job["result"]).write_text(json.dumps(result), "utf-8")


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train with the job's `SFTConfig`; its log, and the weights saved as it saves them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    trainer = SFTTrainer(
        model,
        SFTConfig(**job["config"]),
        train_dataset=_rows(job["train"]),
        eval_dataset=_rows(job["eval"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(job["config"]["output_dir"])
    steps = [line for line in trainer.state.log_history if "loss" in line]
    names = ("loss", "learning_rate", "grad_norm")
    scalars = {name: [line[name] for line in steps] for name in names}
    scalars["eval_loss"] = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    return {"scalars": scalars}


def examples(job: dict[str, Any]) -> dict[str, Any]:
    """What its preparation makes of rows: token ids, and which of them are targets."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    found = []
    for case in job["cases"]:
        tokenizer = AutoTokenizer.from_pretrained(case["tokenizer"])
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
        config = SFTConfig(
            job["scratch"],
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=case["max_tokens"],
            **case["options"],
        )
        trainer = SFTTrainer(model, config, train_dataset=_dataset(case["rows"]), processing_class=tokenizer)
        found.append([_targets(row, tokenizer) for row in trainer.train_dataset])
    return {"cases": found}


def _targets(row: Any, tokenizer: Any) -> dict[str, Any]:
    """The first token has nothing to be predicted from, so it is no target whatever its label."""
    ids, labels = row["input_ids"], row["labels"]
    learned = [i > 0 and label != -100 for i, label in enumerate(labels)]
    return {"ids": ids, "learned": learned, "texts": [tokenizer.decode([i]) for i in ids]}


def _rows(path: str) -> Any:
    return _dataset([json.loads(line) for line in Path(path).read_text("utf-8").splitlines()])


def _dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(rows)


if __name__ == "__main__":
    main()
