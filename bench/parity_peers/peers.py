"""The peers' runs: their jobs written, their processes started, their results read."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from parity_peers import job as ours
from parity_peers.job import Job, Row, Setting, run, write_rows

Peer = Literal["OpenRLHF", "TRL"]
_HERE = Path(__file__).resolve().parent
_SCRIPTS = {"OpenRLHF": _HERE / "openrlhf_run.py", "TRL": _HERE / "trl_run.py"}


@dataclass(frozen=True)
class Peers:
    """Where each one runs: the interpreters of their environments."""

    openrlhf: Path | None
    """None leaves OpenRLHF out."""

    def python(self, peer: Peer) -> str:
        """TRL runs in this environment: the development requirements have it."""
        return sys.executable if peer == "TRL" else str(self.openrlhf)

    def train(self, peer: Peer, job: Job, setting: Setting, packed: bool = False) -> dict[str, Any]:
        """Train on the same rows in our order; its curve in our words."""
        out = job.folder / f"{peer.lower()}-{setting.name}{'-packed' if packed else ''}"
        in_order = job.in_our_order(setting.lengths)
        if peer == "OpenRLHF":
            rows = write_rows(out.with_suffix(".jsonl"), openrlhf_file_order(in_order))
            made = self.ask(
                peer, "train", out.with_suffix(".json"), openrlhf_task(job, setting, rows, out, packed)
            )
            _check_order(made["consumed"], job)
            names = {
                "loss": "train/loss_mean",
                "grad_norm": "train/grad_norm",
                "eval_loss": "eval/eval gpt_loss",
            }
        else:
            rows = write_rows(out.with_suffix(".jsonl"), in_order)
            made = self.ask(peer, "train", out.with_suffix(".json"), trl_task(job, setting, rows, out))
            names = {"loss": "loss", "grad_norm": "grad_norm", "eval_loss": "eval_loss"}
        curve = {name: made["scalars"][tag] for name, tag in names.items()}
        return {**curve, "final": out, "versions": made["versions"], "overrides": made.get("overrides", {})}

    def openrlhf_steps(self, job: Job, rows: Path, out: Path, per_step: int, epochs: int) -> dict[str, Any]:
        """Train with one row to a micro-batch; what it read in order, and the loss of each step."""
        task = openrlhf_task(job, ours.PLAIN, rows, out, packed=False)
        flags = task["flags"]
        changed = {"train.batch_size": per_step, "train.micro_batch_size": 1, "train.max_epochs": epochs}
        for name, value in changed.items():
            flags[flags.index(f"--{name}") + 1] = str(value)
        start = flags.index("--eval.dataset")
        del flags[start : start + 2]
        return self.ask("OpenRLHF", "train", out.with_suffix(".json"), task)

    def examples(
        self, peer: Peer, file: Path, cases: Sequence[Mapping[str, Any]]
    ) -> list[list[dict[str, Any]]]:
        """What its data code makes of the rows of each case."""
        task = {"cases": list(cases), "scratch": str(file.with_suffix(".scratch"))}
        return self.ask(peer, "examples", file, task)["cases"]

    def ask(self, peer: Peer, mode: str, file: Path, task: Mapping[str, Any]) -> dict[str, Any]:
        """Run the peer's script on a job."""
        result = file.with_suffix(".result")
        file.write_text(json.dumps({**task, "result": str(result)}), "utf-8")
        run([self.python(peer), str(_SCRIPTS[peer]), mode, str(file)])
        return json.loads(result.read_text("utf-8"))


def openrlhf_file_order(rows: Sequence[Row]) -> list[Row]:
    """Rows laid out so that OpenRLHF's own shuffle of the first epoch gives them in this order.

    Its sampler takes row `randperm(n, seed + epoch)[i]` as the i-th.
    """
    import torch

    taken = torch.randperm(len(rows), generator=torch.Generator().manual_seed(ours.SEED)).tolist()
    file: list[Row] = [{}] * len(rows)
    for place, row in zip(taken, rows, strict=True):
        file[place] = row
    return file


def _check_order(consumed: Sequence[int], job: Job) -> None:
    """Its training read the rows as `openrlhf_file_order` counts on.

    Raises:
        RuntimeError: It did not, so the curves cannot be compared.
    """
    num = job.num_steps * ours.GLOBAL_EXAMPLES
    places = [row["place"] for row in openrlhf_file_order([{"place": i} for i in range(num)])]
    if [places[index] for index in consumed[:num]] != list(range(num)):
        raise RuntimeError("OpenRLHF read the rows in another order than its sampler's")


def openrlhf_task(job: Job, setting: Setting, rows: Path, out: Path, packed: bool) -> dict[str, Any]:
    """Its command line. bf16 is always named, of the two dtypes that it knows; for fp32 see its OVERRIDES."""
    flags: dict[str, Any] = {
        "model.model_name_or_path": job.model,
        "data.dataset": rows,
        "data.input_key": "messages",
        "data.max_len": ours.MAX_TOKENS,
        "eval.dataset": job.evaluation,
        "eval.steps": job.num_steps,
        "train.batch_size": ours.GLOBAL_EXAMPLES,
        "train.micro_batch_size": ours.MICRO_EXAMPLES,
        "train.max_epochs": 1,
        "train.seed": ours.SEED,
        "adam.lr": ours.LR,
        "adam.eps": ours.EPS,
        "adam.weight_decay": ours.DECAY,
        "max_norm": ours.CLIP,
        "lr_scheduler": "cosine_warmup_with_min_lr",
        "lr_warmup_ratio": ours.WARMUP_RATIO,
        "min_lr_ratio": ours.MIN_LR_RATIO,
        "ds.attn_implementation": "sdpa",
        "ds.param_dtype": "bf16",
        "ckpt.output_dir": out,
    }
    if setting.lora:
        flags |= {"ds.lora.rank": ours.RANK, "ds.lora.alpha": ours.ALPHA}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    given += ["--adam.betas", *map(str, ours.BETAS), "--data.apply_chat_template"]
    if packed:
        given.append("--ds.packing_samples")
    adapter = str(job.adapter) if setting.lora else None
    return {"flags": given, "dtype": setting.dtype, "adapter": adapter, "logs": str(out / "logs")}


def trl_task(job: Job, setting: Setting, rows: Path, out: Path) -> dict[str, Any]:
    """Its SFTConfig, and what its trainer is given."""
    return {
        "model": str(job.model),
        "train": str(rows),
        "eval": str(job.evaluation),
        "adapter": str(job.adapter) if setting.lora else None,
        "config": trl_config(job, setting.dtype, out),
    }


def trl_config(job: Job, dtype: str, out: Path) -> dict[str, Any]:
    """Its SFTConfig; what stands on its defaults is not here."""
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": ours.MICRO_EXAMPLES,
        "per_device_eval_batch_size": ours.MICRO_EXAMPLES,
        "gradient_accumulation_steps": ours.GLOBAL_EXAMPLES // ours.MICRO_EXAMPLES,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "seed": ours.SEED,
        "learning_rate": ours.LR,
        "adam_beta1": ours.BETAS[0],
        "adam_beta2": ours.BETAS[1],
        "adam_epsilon": ours.EPS,
        "weight_decay": ours.DECAY,
        "max_grad_norm": ours.CLIP,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": ours.MIN_LR_RATIO},
        "warmup_steps": round(ours.WARMUP_RATIO * job.num_steps),
        "max_length": ours.MAX_TOKENS,
        "assistant_only_loss": True,
        "gradient_checkpointing": False,
        "bf16": dtype == "bf16",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def openrlhf_case(tokenizer: Path, rows: Sequence[Row], max_tokens: int, **options: Any) -> dict[str, Any]:
    """Rows for its data code; options not of SFTDataset's constructor are its `--data.*` flags."""
    flags = {"input_key": "messages", "output_key": None, "apply_chat_template": True}
    flags |= {name: options.pop(name) for name in list(options) if name in flags}
    return {
        "tokenizer": str(tokenizer),
        "rows": list(rows),
        "max_tokens": max_tokens,
        "data_flags": flags,
        "options": options,
    }


def trl_case(tokenizer: Path, rows: Sequence[Row], max_tokens: int, **options: Any) -> dict[str, Any]:
    """Rows for its data code; options are of SFTConfig."""
    return {"tokenizer": str(tokenizer), "rows": list(rows), "max_tokens": max_tokens, "options": options}
