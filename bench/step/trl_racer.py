"""TRL's SFTTrainer, the whole of it: its own loop, collator, loss and metrics, watched by a callback."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from burnish.host_memory import keep_freed_memory
from burnish.runtime import Ranks, pick_device
from step.cases import Race
from step.racers import labels_of, lora_config
from step.trl_grid import TRL_GRID
from step.turns import Turns, forget_peak


class _Watch(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._first: dict[str, float] = {}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._turns.step_done(facts=self._first)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == 1 and "loss" in logs:  # told with the step after it
            self._first = {"first_loss": logs["loss"]}


def trl(race: Race, turns: Turns, name: str) -> None:
    """One entry of `TRL_GRID`, on the steps' documents in their order."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    settings = dict(TRL_GRID[name])
    if settings:  # at its best it gets the allocator too, at its defaults nothing
        keep_freed_memory(pick_device(Ranks(0, 0, 1)))
    per_step = race.case.examples_per_step
    settings.setdefault("per_device_train_batch_size", min(8, per_step))
    accumulate = max(1, per_step // settings["per_device_train_batch_size"])
    documents = [e for step in range(1, race.windows.num_steps + 1) for e in race.documents(step)]
    rows = Dataset.from_list(
        [{"input_ids": e.token_ids.tolist(), "labels": labels_of(e).tolist()} for e in documents]
    )
    args = SFTConfig(
        str(race.folder / name),
        **{
            "gradient_accumulation_steps": accumulate,
            "max_steps": race.windows.num_steps,
            "train_sampling_strategy": "sequential",
            "learning_rate": 1e-4,
            "adam_beta2": 0.95,
            "max_length": 4096,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "use_cpu": not torch.cuda.is_available(),
            **settings,
        },
    )
    dtype = torch.bfloat16 if race.case.lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(race.model_folder, dtype=dtype)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<pad>": 0}, [])))
    tokenizer.eos_token = tokenizer.pad_token = "<pad>"
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config() if race.case.lora else None,
        callbacks=[_Watch(turns)],
    )
    forget_peak()
    turns.ready({"settings": dict(TRL_GRID[name])})
    trainer.train()
