"""One training run as a value: settings in, everything that was logged out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from burnish.config.schema import Config
from burnish.data.prefixes import Prefixes
from burnish.data.windows import eval_cuts, plan_windows
from burnish.engine.base import Engine
from burnish.engine.build import build_engine, parameter_dtype
from burnish.model.forward import SupervisedModel
from burnish.plan import unshared
from burnish.records import EvalStats, StepStats
from burnish.runtime import Ranks
from burnish.train.loop import TrainJob, train
from burnish.train.step import Feed
from rig.toy import alike_store, toy_config, toy_model, toy_store


@dataclass
class Memory:
    """A recorder that keeps everything."""

    steps: list[StepStats] = field(default_factory=list)
    evals: list[EvalStats] = field(default_factory=list)
    events: list[Mapping[str, Any]] = field(default_factory=list)

    def train(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def eval(self, stats: EvalStats) -> None:
        self.evals.append(stats)

    def event(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)


def make_job(
    config: Config,
    ranks: Ranks,
    *,
    evaluate: bool = False,
    tied: bool = False,
    alike: bool = False,
    model: SupervisedModel | None = None,
) -> TrainJob:
    device = torch.device("cpu")
    if model is None:
        model = toy_model(config, parameter_dtype(config, ranks), tied=tied)
    packed = config.data.packing != "off"
    store = alike_store() if alike else toy_store()
    sharing = config.engine.sequence_parallel
    parts = ranks.world_size // sharing
    prefixes = Prefixes(store, unshared(config, "cpu", model.capability.unshared))
    windows = plan_windows(
        store, config.data, config.batch, config.train, parts, packed, sharing=sharing, prefixes=prefixes
    )
    held_out = toy_store(11, seed=5) if evaluate else None
    return TrainJob(
        config=config,
        engine=build_engine(config, ranks, device, model),
        ranks=ranks,
        windows=windows,
        feed=Feed(store, packed, pad_token_id=0),
        eval_store=held_out,
        eval_cuts=None
        if held_out is None
        else eval_cuts(held_out, config.batch, parts, packed, sharing=sharing),
        recorder=Memory(),
        fingerprints={"data": "toy", "order": f"seed {config.train.seed}"},
    )


def run_case(
    settings: Mapping[str, Any],
    ranks: Ranks,
    output_dir: Path,
    *,
    evaluate: bool = False,
    tied: bool = False,
    alike: bool = False,
    before: Callable[[TrainJob], TrainJob] = lambda job: job,
) -> dict[str, Any]:
    """Train the toy; returns losses, norms, example numbers, evaluations and a weights' hash."""
    config = toy_config(output_dir, settings)
    job = before(make_job(config, ranks, evaluate=evaluate, tied=tied, alike=alike))
    train(job)
    return summary(job)


def summary(job: TrainJob) -> dict[str, Any]:
    memory = job.recorder
    assert isinstance(memory, Memory)
    weights = job.engine.export_state()
    return {
        "losses": [s.loss for s in memory.steps],
        "norms": [s.grad_norm for s in memory.steps],
        "applied": [s.applied for s in memory.steps],
        "example_ids": [list(s.example_ids) for s in memory.steps],
        "micro_batches": [s.num_micro_batches for s in memory.steps],
        "evals": [[e.step, e.loss, {n: v["loss"] for n, v in e.sources.items()}] for e in memory.evals],
        "events": [dict(e) for e in memory.events],
        "shapes": None if weights is None else {n: list(t.shape) for n, t in weights.items()},
        "hash": None if weights is None else weights_hash(weights),
    }


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def final_weights(engine: Engine) -> dict[str, torch.Tensor]:
    weights = engine.export_state()
    assert weights is not None
    return weights
