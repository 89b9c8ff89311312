"""What a worker can be asked to do, by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from breadth.partitioned import partitioned
from burnish.config.schema import Config
from burnish.data.collate import collate
from burnish.engine.base import Engine, StepResult
from burnish.engine.build import model_init_context, parameter_dtype
from burnish.engine.gradients import sum_gradients
from burnish.errors import BurnishError
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.forward import SupervisedModel
from burnish.model.load import load_model, load_model_config, stored_dtype
from burnish.records import MicroBatch, StepStats
from burnish.runtime import Ranks, barrier, sum_over_ranks
from burnish.train.loop import TrainJob, train
from rig.grown import begun, grown, sighted
from rig.half import deepspeed_accepts_fp16, restless_scale
from rig.runs import Memory, make_job, run_case, summary, weights_hash
from rig.toy import toy_config, toy_llama, toy_model


class PoisonedEngine(Engine):
    """An engine whose loss is not finite at chosen steps on one rank, or on none."""

    def __init__(self, inner: Engine, poison: Mapping[int, float]) -> None:
        self._inner = inner
        self._poison = poison
        self._step = 1

    @property
    def device(self) -> torch.device:
        return self._inner.device

    def forward_backward(self, micro_batch: MicroBatch, total_weight: float) -> torch.Tensor:
        return self._inner.forward_backward(micro_batch, self._poison.get(self._step, total_weight))

    def rehearse(self, micro_batch: MicroBatch) -> None:
        self._inner.rehearse(micro_batch)

    def step(self, lr: float) -> StepResult:
        self._step += 1
        return self._inner.step(lr)

    def evaluate(self, micro_batch: MicroBatch) -> torch.Tensor:
        return self._inner.evaluate(micro_batch)

    def save_state(self, folder: Path) -> Sequence[Path]:
        return self._inner.save_state(folder)

    def load_state(self, folder: Path) -> None:
        self._inner.load_state(folder)

    def export_state(self) -> dict[str, torch.Tensor] | None:
        return self._inner.export_state()


@dataclass
class HashingMemory(Memory):
    """Also keeps a hash of the weights after every step."""

    engine: Engine | None = None
    hashes: list[str | None] = field(default_factory=list)

    def train(self, stats: StepStats) -> None:
        super().train(stats)
        assert self.engine is not None
        weights = self.engine.export_state()
        self.hashes.append(None if weights is None else weights_hash(weights))


@dataclass
class SignallingMemory(Memory):
    """Sends this process a signal when a step has been recorded."""

    at_step: int = 0
    number: int = signal.SIGKILL

    def train(self, stats: StepStats) -> None:
        super().train(stats)
        if stats.step == self.at_step:
            os.kill(os.getpid(), self.number)


def plain(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """Train as the settings say; `folder` names a run to share."""
    folder = output_dir.parent / case.get("folder", output_dir.name)
    return run_case(
        case["settings"],
        ranks,
        folder,
        evaluate=case.get("evaluate", False),
        tied=case.get("tied", False),
        alike=case.get("alike", False),
    )


def measured(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """Train as the settings say; rank 0 leaves the weights from before and after in the folder."""
    config = toy_config(output_dir, case["settings"])
    job = make_job(config, ranks, evaluate=case.get("evaluate", False))
    _write_weights(job.engine, output_dir / "start.safetensors")
    train(job)
    _write_weights(job.engine, output_dir / "weights.safetensors")
    return summary(job)


def _write_weights(engine: Engine, path: Path) -> None:
    weights = engine.export_state()
    if weights is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.float().clone() for name, tensor in weights.items()}, path)


def gradients(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """The gradients of the first window's loss under the local engine, in the folder."""
    config = toy_config(output_dir, case["settings"])
    model = toy_model(config, torch.float32)
    job = make_job(config, ranks, model=model)
    window, feed = job.windows.window(1), job.feed
    loss = torch.zeros(())
    for ids in window.cuts[ranks.rank]:
        micro_batch = collate([feed.store[int(i)] for i in ids], ids, feed.packed, feed.pad_token_id)
        loss += job.engine.forward_backward(micro_batch, window.total_weight)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sum_gradients(list(named.values()), ranks)
    if ranks.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        save_file(found, output_dir / "gradients.safetensors")
    return {"losses": [sum_over_ranks(loss, ranks).item()]}


def poisoned(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """Train with losses that are not finite at `steps`, on the last rank only."""
    is_last = ranks.rank == ranks.world_size - 1
    poison = {int(step): float(value) for step, value in case["steps"].items()} if is_last else {}
    job = make_job(toy_config(output_dir, case["settings"]), ranks)
    engine = PoisonedEngine(job.engine, poison)
    job = replace(job, engine=engine, recorder=HashingMemory(engine=engine))
    return {**_attempt(job), "hashes": job.recorder.hashes}  # pyright: ignore[reportAttributeAccessIssue]


def signalled(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """Send the last rank a signal after a step."""
    folder = output_dir.parent / case.get("folder", output_dir.name)
    job = make_job(toy_config(folder, case["settings"]), ranks)
    if ranks.rank == ranks.world_size - 1:
        job = replace(job, recorder=SignallingMemory(at_step=case["at_step"], number=case["signal"]))
    return _attempt(job)


def half(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """In fp16; with a `power`, under a `restless_scale`; stopped by a signal after `at_step`."""
    run = signalled if "at_step" in case else plain
    with deepspeed_accepts_fp16(), restless_scale(case["power"]) if "power" in case else nullcontext():
        return run({**case, "settings": {**case["settings"], "model.dtype": "fp16"}}, ranks, output_dir)


def wide(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """Train a toy whose MLP's weights are large enough (over 1 MiB a rank) to be swapped to a disk."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    folder = output_dir.parent / case.get("folder", output_dir.name)
    config = toy_config(folder, case["settings"])
    model = toy_model(config, parameter_dtype(config, ranks), mlp_width=32_768)
    swap_in = AsyncPartitionedParameterSwapper.swap_in
    with mock.patch.object(
        AsyncPartitionedParameterSwapper, "swap_in", autospec=True, side_effect=swap_in
    ) as reads:
        job = make_job(config, ranks, model=model)
        if "at_step" in case and ranks.is_main:
            job = replace(job, recorder=SignallingMemory(at_step=case["at_step"], number=case["signal"]))
        before = reads.call_count
        found = _attempt(job)
        found["weights_read"] = reads.call_count - before
    files = {path.parent.parent.name: 0 for path in folder.glob(".offload/zero_stage_3/*/rank*/*")}
    for path in folder.glob(".offload/zero_stage_3/*/rank*/*"):
        files[path.parent.parent.name] += path.stat().st_size
    return {**found, "swapped_bytes": files}


def _attempt(job: TrainJob) -> dict[str, Any]:
    error: BurnishError | None = None
    try:
        train(job)
    except BurnishError as caught:
        error = caught
    return {
        **summary(job),
        "error": None if error is None else type(error).__name__,
        "message": str(error),
        "exit_code": 0 if error is None else error.exit_code,
    }


def loaded(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """Train a model that is loaded from a folder, as run.py loads it."""
    config, model = _loaded_toy(case, ranks, output_dir)
    partitioned = all(p.numel() == 0 for p in model.parameters())
    model = adapt(model, config.adapter, "none")
    job = make_job(config, ranks, model=SupervisedModel(model, can_isolate(model)))
    train(job)
    return {**summary(job), "partitioned": partitioned}


def masters(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """Which of ZeRO's masters differ from the fp32 weights of the toy, fresh or `loaded`, before a step."""
    config = toy_config(output_dir, case["settings"])
    fresh = toy_model(config, torch.float32)
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    model = fresh
    if case["loaded"]:
        config, found = _loaded_toy(case, ranks, output_dir)
        model = SupervisedModel(found, can_isolate(found))
    make_job(config, ranks, model=model)
    from deepspeed.utils import safe_get_full_fp32_param

    now = {name: (p.dtype, safe_get_full_fp32_param(p)) for name, p in model.named_parameters()}
    assert before.keys() == now.keys()
    wrong = [name for name in before if now[name][1] is None or not now[name][1].equal(before[name])]
    return {"wrong": wrong, "forward": sorted({str(dtype) for dtype, _ in now.values()})}


def _loaded_toy(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> tuple[Config, PreTrainedModel]:
    folder = output_dir.parent / "toy-llama"
    if ranks.is_main:
        toy_llama().save_pretrained(folder)
    barrier(ranks)
    settings = {**case["settings"], "model.path": str(folder), "model.init": "pretrained"}
    config = toy_config(output_dir, settings)
    dtype = parameter_dtype(config, ranks, stored_dtype(config.model, load_model_config(config.model)))
    model = load_model(
        config.model,
        seed=config.train.seed,
        init_context=model_init_context(config, ranks, torch.device("cpu"), dtype),
        param_dtype=dtype,
    )
    return config, model


CASES: dict[str, Callable[[Mapping[str, Any], Ranks, Path], dict[str, Any]]] = {
    "plain": plain,
    "masters": masters,
    "measured": measured,
    "gradients": gradients,
    "poisoned": poisoned,
    "signalled": signalled,
    "loaded": loaded,
    "wide": wide,
    "half": half,
    "grown": grown,
    "begun": begun,
    "sighted": sighted,
    "partitioned": partitioned,
}
