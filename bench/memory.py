"""Measure what `burnish train` really takes, rank by rank, against what `plan` said.

    python bench/memory.py                 every case, half an hour on 2 cores
    python bench/memory.py zero-2 lora     the cases whose name holds one of these words

Every case trains a few steps on the CPU by the same code as `burnish train`. A rank's memory is its resident
set: what it holds right before the model is built is the baseline (the interpreter, torch, DeepSpeed, the
prepared data), and the peak is the kernel's high-water mark (`VmHWM`, set back through
`/proc/self/clear_refs`) in each phase of the run: loading, building the engine, evaluating, stepping, saving,
exporting. Linux only.

The C library keeps freed memory, in pieces, so that a process holds more than is in use. By default it is
told to give every tensor pages of its own and to return them when the tensor is freed: then the resident set
is what is in use, and is compared with the plan's parts for tensors. `--as-is` measures with the allocator as
`train` leaves it, over more steps, and compares with what the plan lets a process keep, too.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 384, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 1024, "vocab_size": 32_000,
    "max_position_embeddings": 16_384, "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1408, "vocab_size": 151_936,
    "max_position_embeddings": 16_384, "tie_word_embeddings": True,
}  # fmt: skip
NUM_STEPS, NUM_STEPS_AS_IS = 2, 12
"""Pieces grow for some steps."""
_VOCABULARY = 500
"""Token numbers that the data uses; how many there are makes no difference to memory."""
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One configuration to measure."""

    name: str
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Sections of the config, over those of `write_job`."""
    model: Mapping[str, Any] = field(default_factory=lambda: LLAMA)
    num_processes: int = 1
    document_tokens: tuple[int, int] = (64, 512)
    """Shortest and longest document."""


def _zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"engine": {"kind": "deepspeed", "zero_stage": stage, **more}}


_LONG: dict[str, Any] = {
    "data": {"max_tokens": 16_384},
    "batch": {"micro_tokens": 16_384},
    "model": {"activation_checkpointing": "full"},
}

CASES = (
    Case("fp32 full", {"model": {"dtype": "fp32"}}),
    Case("bf16 full"),
    Case("bf16 full, evaluation, saves", {
        "data": {"eval_fraction": 0.1}, "eval": {"every_steps": 2}, "checkpoint": {"every_steps": 2},
    }),
    Case("bf16 LoRA", {"adapter": {"rank": 16, "alpha": 32}}),
    Case("bf16, checkpointing light", {"model": {"activation_checkpointing": "light"}}),
    Case("bf16, checkpointing full", {
        "model": {"activation_checkpointing": "full"}, "batch": {"micro_tokens": 8192},
    }),
    Case("bf16 LoRA, checkpointing full", {
        "adapter": {"rank": 16, "alpha": 32}, "model": {"activation_checkpointing": "full"},
        "batch": {"micro_tokens": 8192},
    }),
    Case("bf16 adamw_8bit", {"optim": {"name": "adamw_8bit"}}),
    Case("bf16 adafactor", {"optim": {"name": "adafactor"}}),
    Case("bf16 long documents", {"data": {"max_tokens": 8192}, "batch": {"micro_tokens": 8192}},
         document_tokens=(6000, 8000)),
    Case("bf16, 16,000 tokens in one", _LONG, document_tokens=(16_000, 16_000)),
    Case("bf16, 16,000 tokens in one, MLP in tiles", {
        **_LONG, "model": {"activation_checkpointing": "full", "mlp_tile_tokens": 2048},
    }, document_tokens=(16_000, 16_000)),
    Case("qwen bf16 full", model=QWEN),
    Case("qwen bf16 LoRA", {"adapter": {"rank": 16, "alpha": 32}}, model=QWEN),
    Case("zero-1 bf16", _zero(1), num_processes=2),
    Case("zero-2 bf16", _zero(2), num_processes=2),
    Case("zero-3 bf16", _zero(3), num_processes=2),
    Case("zero-2 fp32", {**_zero(2), "model": {"dtype": "fp32"}}, num_processes=2),
    Case("zero-3 bf16, offload to CPU", _zero(3, offload_optimizer="cpu", offload_params="cpu"),
         num_processes=2),
    Case("zero-2 bf16 LoRA", {**_zero(2), "adapter": {"rank": 16, "alpha": 32}}, num_processes=2),
)  # fmt: skip


# ------------------------------------------------------------------ the job


def write_job(case: Case, folder: Path, num_steps: int = NUM_STEPS) -> Path:
    """Write model folder, data and config of a case; returns the config's path."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(_VOCABULARY)} | {"<end>": _VOCABULARY}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="<end>",
        pad_token="<end>",
        chat_template="{{ messages[0].content }}",
    ).save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(case.model))
    config: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "init": "random"},
        "data": {
            "train": str(folder / "train.jsonl"), "max_tokens": 1024, "num_workers": 1,
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"micro_tokens": 4096},
        "train": {"max_steps": num_steps},
        "launch": {"num_processes": case.num_processes},
        "checkpoint": {"resume": "never"},
        "log": {"trackers": []},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    for section, keys in case.config.items():
        config[section] = config.get(section, {}) | keys
    # Two micro-batches a step and rank: gradients of the first are there while the second is computed.
    tokens_per_step = 2 * config["batch"]["micro_tokens"] * case.num_processes
    config["batch"].setdefault("global_tokens", int(tokens_per_step * 0.98))
    _write_data(folder / "train.jsonl", case.document_tokens, tokens_per_step * (num_steps + 1))
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _write_data(file: Path, document_tokens: tuple[int, int], num_tokens: int) -> None:
    chance = random.Random(0)
    with file.open("w") as out:
        while num_tokens > 0:
            length = chance.randint(*document_tokens)
            num_tokens -= length
            ids = [chance.randrange(_VOCABULARY) for _ in range(length)]
            weights = [float(i >= length // 8) for i in range(length)]
            out.write(json.dumps({"input_ids": ids, "weights": weights}) + "\n")


# ------------------------------------------------------------------ inside a rank


class _Meter:
    """Peaks over the baseline, by phase."""

    def __init__(self) -> None:
        self.baseline = 0
        self.peaks: dict[str, int] = {}
        self.phase = "start"

    def begin(self) -> None:
        """The memory held now is the baseline."""
        self.baseline = _status("VmRSS")
        _forget_peak()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is the peak while entered counts for `phase`, what was before for the one around it."""
        self._note()
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self._note()
            self.phase = outer

    def _note(self) -> None:
        peak = _status("VmHWM") - self.baseline
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), peak)
        _forget_peak()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _map_every_tensor() -> None:
    """Have glibc map whatever is larger than 64 KiB by itself, and unmap it when it is freed."""
    m_mmap_threshold, m_mmap_max, libc = -3, -4, ctypes.CDLL(None)
    if not (libc.mallopt(m_mmap_threshold, 64 * 1024) and libc.mallopt(m_mmap_max, 2**20)):
        raise RuntimeError("this C library cannot be told")


def run_rank(config_path: Path, as_is: bool) -> None:
    """Train as one rank, and write `memory-RANK.json` beside the config."""
    from burnish import host_memory, run
    from burnish.config.load import load_config
    from burnish.runtime import pick_device, ranks_from_environment, setup_logging
    from burnish.train import loop

    ranks = ranks_from_environment()
    setup_logging(ranks)
    if not as_is:
        _map_every_tensor()
    config = load_config(config_path, [])
    host_memory.bound_kernel_caches(pick_device(ranks))
    _warm_up(config)
    meter = _Meter()

    def measured(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            if phase == "load":
                meter.begin()
            with meter.during(phase):
                return function(*arguments, **named)

        return wrapper

    if not as_is:
        host_memory.FreedMemory.settle = lambda *_: None  # type: ignore[method-assign]
    # The run calls its stages by these names: a meter around each, and nothing else is changed.
    for module, name, phase in (
        (run, "build_model", "load"),
        (run, "can_isolate", "try out"),
        (run, "build_engine", "engine"),
        (loop, "evaluate", "evaluate"),
        (loop, "train_step", "step"),
        (loop, "save_checkpoint", "save"),
    ):
        setattr(module, name, measured(getattr(module, name), phase))
    run.Exporter.export = measured(run.Exporter.export, "export")  # type: ignore[method-assign]
    run.train(config)
    told = {"baseline": meter.baseline, "peaks": meter.peaks}
    config_path.with_name(f"memory-{ranks.rank}.json").write_text(json.dumps(told))


def _warm_up(config: Any) -> None:
    """Load what is loaded lazily: libraries and their kernels are no part of a model's memory."""
    import torch
    import transformers

    getattr(transformers, _architecture(config.model.path))
    if config.engine.kind == "deepspeed":
        import burnish.engine.deepspeed  # noqa: F401
    if config.optim.name == "adamw_8bit":
        import bitsandbytes  # noqa: F401
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 64, dtype=dtype)
        layer(torch.ones(64, 64, dtype=dtype)).float().logsumexp(-1).sum().backward()
        torch.optim.AdamW(layer.parameters(), fused=True).step()


def _architecture(model_path: str) -> str:
    """The class that a model folder names."""
    return json.loads((Path(model_path) / "config.json").read_text())["architectures"][0]


# ------------------------------------------------------------------ the comparison


@dataclass(frozen=True)
class Outcome:
    """One case, planned and measured; bytes."""

    name: str
    planned: dict[str, int]
    """plan.json's memory by part, what is offloaded to the host too."""
    peaks: list[dict[str, int]]
    """Of each rank, by phase, over the baseline."""

    @property
    def planned_total(self) -> int:
        """On a CPU the host is the device."""
        return self.planned["total"]

    @property
    def peak(self) -> int:
        """Of the rank that needs most."""
        return max(max(by_phase.values()) for by_phase in self.peaks)

    @property
    def phase(self) -> str:
        """Where that was."""
        worst = max(self.peaks, key=lambda by_phase: max(by_phase.values()))
        return max(worst, key=lambda name: worst[name])

    @property
    def error(self) -> float:
        """Plan over measurement, minus 1."""
        return self.planned_total / self.peak - 1


def measure(case: Case, folder: Path, as_is: bool = False) -> Outcome:
    """Train a case in processes of its own.

    Raises:
        RuntimeError: It failed.
    """
    from burnish.launch import launch

    config = write_job(case, folder, NUM_STEPS_AS_IS if as_is else NUM_STEPS)
    how = ["--as-is"] if as_is else []
    code = launch(case.num_processes, [sys.executable, __file__, "--rank", str(config), *how])
    if code != 0:
        raise RuntimeError(f"{case.name}: exit code {code}")
    plan = json.loads((folder / "run" / "plan.json").read_text())
    planned = {name: num for name, num in plan["memory_bytes"].items() if name not in ("process", "total")}
    if not as_is:
        del planned["kept"]
    planned["offloaded"] = plan["host_memory_bytes"]
    planned["total"] = sum(planned.values())
    ranks = [json.loads((folder / f"memory-{r}.json").read_text()) for r in range(case.num_processes)]
    return Outcome(case.name, planned, [told["peaks"] for told in ranks])


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a case: MiB planned by part, MiB measured by phase, and how far they differ."""
    parts = [name for name in outcomes[0].planned if name != "total"]
    lines = ["| case | " + " | ".join(parts) + " | plan | measured | at | plan over measured |"]
    lines.append("|---|" + "---:|" * (len(parts) + 2) + "---|---:|")
    for outcome in outcomes:
        numbers = " | ".join(f"{outcome.planned[name] / MIB:,.0f}" for name in parts)
        lines.append(
            f"| {outcome.name} | {numbers} | {outcome.planned_total / MIB:,.0f} | {outcome.peak / MIB:,.0f} "
            f"| {outcome.phase} | {outcome.error:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write JSON where asked; exit code 1 where a plan is off by more than --within."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="only cases whose name holds one of these")
    parser.add_argument("--within", type=float, default=0.15)
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    parser.add_argument("--as-is", action="store_true", help="leave the C library's allocator as it is")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.as_is)
        return
    cases = [c for c in CASES if not options.words or any(word in c.name for word in options.words)]
    outcomes = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="burnish-memory-") as folder:
            outcomes.append(measure(case, Path(folder), options.as_is))
        first = {phase: round(peak / MIB) for phase, peak in outcomes[-1].peaks[0].items()}
        print(f"{table(outcomes[-1:])}\nMiB on rank 0: {first}", file=sys.stderr, flush=True)
    print(table(outcomes))
    if options.json is not None:
        told = [asdict(outcome) | {"error": outcome.error} for outcome in outcomes]
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    sys.exit(any(abs(outcome.error) > options.within for outcome in outcomes))


if __name__ == "__main__":
    main()
