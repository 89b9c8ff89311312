"""Shared prefixes on and off: whole optimizer steps on the same examples, in turn.

    python bench/prefix.py --quick            # two shapes, a few minutes on 2 cores
    python bench/prefix.py --out FILE.json

Several answers to each prompt, a share f of the tokens trained on (the answers). Two models: `bench` is
the width and vocabulary that the other benchmarks use, where the head is more than half of the layers and
sharing cannot make it smaller; `llama` is a small model whose head has the share that it has in an 8B
Llama (one thirteenth of the layers). Parity first: the loss and every gradient in fp32, shared against
apart. Then rounds in turn, one untimed step before each; a ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from burnish.config.schema import BatchConfig, DataConfig, OptimConfig, TrainConfig
from burnish.data.collate import collate
from burnish.data.prefixes import Prefixes
from burnish.data.store import ExampleStore
from burnish.data.windows import WindowPlan, plan_windows
from burnish.engine.local import LocalEngine
from burnish.host_memory import keep_freed_memory
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.plan import CostModel
from burnish.records import Example
from burnish.runtime import Ranks
from burnish.train.step import Feed, train_step

ALONE = Ranks(0, 0, 1)
PARITY = 1e-5


@dataclass(frozen=True)
class Shape:
    """A model to time."""

    width: int
    inner: int
    layers: int
    vocabulary: int


SHAPES = {"bench": Shape(384, 1024, 6, 32_000), "llama": Shape(512, 1792, 6, 3328)}


def build(shape: Shape) -> SupervisedModel:
    """A Llama of this shape, fp32 with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64,
    )
    model = LlamaForCausalLM(config)
    return SupervisedModel(model, can_isolate(model)).train()


def examples(vocabulary: int, num_prompts: int, answers: int, prompt: int, answer: int) -> ExampleStore:
    """Random tokens: `answers` examples that go on from each prompt."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(num_prompts):
        begin = rng.integers(0, vocabulary, prompt)
        for _ in range(answers):
            tokens = np.concatenate([begin, rng.integers(0, vocabulary, answer)]).astype(np.int32)
            weights = (np.arange(len(tokens)) >= prompt).astype(np.float32)
            made.append(Example("made", f"made:{number}", tokens, weights))
    return ExampleStore.from_examples(made)


def windows(store: ExampleStore, micro_tokens: int, prefixes: Prefixes | None) -> WindowPlan:
    """All examples in every window."""
    batch = BatchConfig(global_examples=len(store), micro_tokens=micro_tokens)
    data = DataConfig.model_validate({"train": "made", "max_tokens": micro_tokens})
    train = TrainConfig(max_steps=1000)
    return plan_windows(store, data, batch, train, 1, True, CostModel(), prefixes=prefixes)


def parity(model: SupervisedModel, store: ExampleStore, plans: dict[str, WindowPlan]) -> float:
    """The widest gap of loss and gradients between the two, relative to each one's largest number."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, plan in plans.items():
        window = plan.window(1)
        total = torch.zeros(())
        for ids in window.cuts[0]:
            shares = window.num_computed_tokens is not None
            batch = collate([store[int(i)] for i in ids], ids, True, 0, shares)
            loss = model(to_device(batch, torch.device("cpu"))) / window.total_weight
            loss.backward()
            total += loss.detach()
        found[name] = [total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.zero_grad(set_to_none=True)
    pairs = zip(found["shared"], found["off"], strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def race(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One shape: parity, then rounds of steps with and without."""
    shape = SHAPES[name]
    prompt = round(args.tokens * (1 - args.share))
    store = examples(shape.vocabulary, args.prompts, args.answers, prompt, args.tokens - prompt)
    plans = {
        "shared": windows(store, args.micro_tokens, Prefixes(store)),
        "off": windows(store, args.micro_tokens, None),
    }
    gap = parity(build(shape), store, plans)
    if gap > PARITY:
        raise SystemExit(f"{name}: shared and apart differ by {gap:.1e}: nothing is timed")
    # One model and engine for both: what differs is the windows' cut alone.
    engine = LocalEngine(
        build(shape), OptimConfig(), ranks=ALONE, device=torch.device("cpu"),
        compute_dtype=torch.bfloat16, adapter_only=False,
    )  # fmt: skip
    feed = Feed(store, True, 0)
    seconds: dict[str, list[float]] = {"shared": [], "off": []}
    for round_ in range(args.rounds + 1):
        for kind in ("shared", "off") if round_ % 2 else ("off", "shared"):
            started = time.perf_counter()
            train_step(engine, plans[kind].window(round_ + 1), feed, ALONE, lr=1e-6)
            if round_:  # the first round warms up
                seconds[kind].append(time.perf_counter() - started)
    ratios = [off / shared for off, shared in zip(seconds["off"], seconds["shared"], strict=True)]
    window = plans["shared"].window(1)
    assert window.num_computed_tokens is not None
    return {
        "shape": name,
        "parity": gap,
        "answers_per_prompt": args.answers,
        "supervised_share": window.num_supervised_tokens / window.num_tokens,
        "num_tokens": window.num_tokens,
        "num_computed_tokens": window.num_computed_tokens,
        "tokens_ratio": window.num_tokens / window.num_computed_tokens,
        "seconds_shared": statistics.median(seconds["shared"]),
        "seconds_off": statistics.median(seconds["off"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": args.rounds,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="both unless given")
    parser.add_argument("--answers", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--share", type=float, default=0.3, help="share of tokens trained on")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of an example")
    parser.add_argument("--prompts", type=int, default=16, help="prompts in a window")
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="half the prompts, 3 rounds")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.rounds = 12, 3
    return args


def main() -> None:
    """Print one line per shape."""
    args = parse()
    keep_freed_memory(torch.device("cpu"))
    results = []
    for name in args.shape or SHAPES:
        found = race(name, args)
        results.append(found)
        print(
            f"{name}: {found['ratio']:.2f} times ({found['ratio_min']:.2f} to {found['ratio_max']:.2f}), "
            f"{found['seconds_off']:.2f} s to {found['seconds_shared']:.2f} s a step; tokens "
            f"{found['num_tokens']:,} to {found['num_computed_tokens']:,} ({found['tokens_ratio']:.2f} "
            f"times); parity {found['parity']:.1e}",
            flush=True,
        )
    if args.out is not None:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()}
        args.out.write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
