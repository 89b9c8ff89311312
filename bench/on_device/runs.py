"""Whole runs of `burnish train` on a device, started as a user starts them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cluster.tiny_job import losses, write_tiny_job
from on_device.kernels import matrix_rate
from on_device.rows import Rows

ROOT = Path(__file__).resolve().parent.parent.parent

LOSS_BOUND = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2, "8bit": 5e-2}
"""Relative, against one process in fp32 on the CPU."""
LONGEST_ERROR = 3000
"""Characters, from the end: the machine may be gone when somebody reads it."""


def marked_tests(device: str) -> dict[str, Any]:
    """The tests marked `gpu`. Other files are not collected: they may want packages that are not here."""
    every = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(path) for path in every if "mark.gpu" in path.read_text()]
    flags = ["-m", "gpu", "-q", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *flags, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    ran = re.search(r"\d+ passed", last) is not None
    failures = {"failures": done.stdout[-LONGEST_ERROR:]} if done.returncode else {}
    return {"ok": done.returncode == 0 and (ran or device == "cpu"), "pytest": last, **failures}


def engines(folder: Path, device: str, rows: Rows) -> dict[str, Any]:
    """One small run under every engine, on this device: the losses are those of fp32 on the CPU."""
    shutil.rmtree(folder, ignore_errors=True)
    job = write_tiny_job(folder / "job")
    reference = _train(job, folder / "cpu", {"engine.kind": "local"}, hide_gpu=True)
    assert reference["code"] == 0, reference["error"]
    expected = losses(folder / "cpu")
    dtypes = ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16")
    kinds: list[tuple[str, int]] = [("local", 0), *(("deepspeed", stage) for stage in (0, 1, 2, 3))]

    jobs: dict[str, tuple[dict[str, Any], str]] = {
        f"{kind}{stage if kind == 'deepspeed' else ''}-{dtype}": (
            {"engine.kind": kind, "engine.zero_stage": stage, "model.dtype": dtype},
            dtype,
        )
        for dtype in dtypes
        for kind, stage in kinds
    }
    if device == "cuda" and importlib.util.find_spec("bitsandbytes"):
        jobs["local-fp32-adamw_8bit"] = {"engine.kind": "local", "optim.name": "adamw_8bit"}, "8bit"
    hidden = device == "cpu"

    def one(name: str, flags: Mapping[str, Any], bound: str) -> dict[str, Any]:
        return _beside(name, _train(job, folder / name, flags, hidden), folder / name, expected, bound)

    def quantized() -> dict[str, Any]:
        name, flags = "local-bf16-nf4", _nf4(folder / "cpu" / "final")
        on_cpu = _train(job, folder / "cpu-nf4", flags, hide_gpu=True)
        if on_cpu["code"]:
            return {"engine": name, "ok": False, "error": on_cpu["error"]}
        run = _train(job, folder / name, flags, hidden)
        return _beside(name, run, folder / name, losses(folder / "cpu-nf4"), "bf16")

    with ThreadPoolExecutor(PARALLEL_ENGINES if device == "cuda" else 1) as several:
        found = [several.submit(one, name, *how) for name, how in jobs.items()]
        if importlib.util.find_spec("bitsandbytes"):
            found.append(several.submit(quantized))
        for done in as_completed(found):
            rows.add(done.result())
    return {"ok": all(row["ok"] for row in rows.all), "rows": rows.all}


def _nf4(base: Path) -> dict[str, Any]:
    """Flags of QLoRA on a model that has been trained: fresh weights are not quantised."""
    adapter = {"adapter.kind": "lora", "adapter.quantize": "nf4"}
    return {
        "engine.kind": "local",
        "model.dtype": "bf16",
        "model.path": base,
        "model.init": "pretrained",
    } | adapter


def _beside(
    name: str, run: Mapping[str, Any], out: Path, expected: list[float], bound: str
) -> dict[str, Any]:
    """A run's losses beside those expected of it."""
    worst = _worst(losses(out), expected) if run["code"] == 0 else None
    good = worst is not None and worst < LOSS_BOUND[bound]
    return {"engine": name, "ok": good, "worst_loss_difference": worst, "error": run["error"]}


def _worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def _train(
    config: Path, out: Path, flags: Mapping[str, Any], hide_gpu: bool, num_steps: int | None = None
) -> dict[str, Any]:
    """A run, to its end; or, with `num_steps`, killed after so many: an 8B result is 16 GB to write."""
    command = [sys.executable, "-m", "burnish", "train", str(config), "--output_dir", str(out)]
    command += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    env = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "" if hide_gpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    }
    log = out.parent / f"{out.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env)
        while process.poll() is None:
            if num_steps is not None and _num_logged(out) >= num_steps:
                process.kill()
                process.wait()
                return {"code": 0, "error": ""}
            time.sleep(0.2)
    error = log.read_text()[-LONGEST_ERROR:] if process.returncode else ""
    return {"code": process.returncode, "error": error}


def _num_logged(run_dir: Path) -> int:
    """Steps that a run has written down."""
    file = run_dir / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.is_file() else 0


_QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {**_LLAMA, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "0.5b": {**_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5b": {**_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "8b": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
}  # fmt: skip
SMALL_OPTIMIZER = "adamw_8bit" if importlib.util.find_spec("bitsandbytes") else "adafactor"
LORA = {"kind": "lora", "rank": 64, "alpha": 128.0}
SPEED_RUNS: Mapping[str, Mapping[str, Any]] = {
    "0.5b-full": {"size": "0.5b", "goal": 115e3},
    "1.5b-full": {"size": "1.5b", "goal": 50e3},
    "8b-lora": {"size": "8b", "adapter": LORA, "goal": 15.5e3},
    # fp32 weights, gradients and two moments of 8e9 parameters are 128 GB, too much beside activations; even
    # so `none` is planned with 148 GB, `light` with 113.
    "8b-full": {
        "size": "8b",
        "optim": {"name": SMALL_OPTIMIZER},
        "model": {"activation_checkpointing": "light"},
        "least_bytes": 120e9,
        "goal": 10.6e3,
    },
}
"""Runs and the tokens/s that they should reach on one H200."""
COMPILED = "-compiled"
"""Behind a run's name: the same with `model.compile`."""
PARALLEL_ENGINES = 3
"""Small runs on the device at once: most of their time is starting."""
RACES = (
    "qwen-0.5b/documents", "qwen-0.5b-lora/documents", "qwen-1.5b/documents", "llama/alpaca",
    "llama/long-prompts", "qwen/alpaca", "llama-lora/alpaca",
)  # fmt: skip
WARM_STEPS, MEASURED_STEPS, TOKENS = 4, 8, 4096


def speed(folder: Path, device: str, quick: bool, names: list[str] | None, rows: Rows) -> dict[str, Any]:
    """`burnish train` on full documents: tokens/s, share of the matrix rate, memory against the plan."""
    if quick:
        tiny = {"size": "tiny", "goal": 0.0}
        chosen: Mapping[str, Any] = {"tiny": tiny, "tiny-compiled": {**tiny, "model": {"compile": True}}}
    else:
        chosen = {name: _speed_run(name) for name in names or speed_names()}
    # In a process of its own: what it leaves on the device is not there for the runs.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as beside:
        rate = beside.submit(matrix_rate, device, 1024 if quick else 8192).result()
        memory = beside.submit(_device_bytes, device).result()
    ok = True
    for name, run in chosen.items():
        if memory is not None and memory < run.get("least_bytes", 0):
            rows.add({"run": name, "skipped": f"needs {run['least_bytes'] / 1e9:.0f} GB"})
            continue
        row = _one_speed(folder / name, run, device, 256 if quick else TOKENS, rate)
        shutil.rmtree(folder / name, ignore_errors=True)  # an exported 8B model is 16 GB
        rows.add({"run": name, **row})
        ok = ok and "error" not in row
    return {"ok": ok, "matrix_flops_per_second": rate, "rows": rows.all}


def speed_names() -> list[str]:
    """Every run of `speed`."""
    return [name + ending for name in SPEED_RUNS for ending in ("", COMPILED)]


def _speed_run(name: str) -> Mapping[str, Any]:
    run = SPEED_RUNS[name.removesuffix(COMPILED)]
    if not name.endswith(COMPILED):
        return run
    model = {k: v for k, v in run.get("model", {}).items() if k != "activation_checkpointing"}
    level = {"activation_checkpointing": "full"} if run.get("model") else {}  # `light` is the compiler's
    return {**run, "model": {**model, **level, "compile": True}}


def _device_bytes(device: str) -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None


def _one_speed(folder: Path, run: Mapping[str, Any], device: str, tokens: int, rate: float) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    job = write_tiny_job(folder)
    architecture = {**ARCHITECTURES[run["size"]], "max_position_embeddings": tokens}
    (folder / "model" / "config.json").write_text(json.dumps(architecture))
    _write_documents(folder / "train.jsonl", tokens, num=8 * (WARM_STEPS + MEASURED_STEPS))
    config = yaml.safe_load(job.read_text())
    config["model"] |= {"dtype": "bf16", **run.get("model", {})}
    config["data"] |= {
        "max_tokens": tokens,
        "train": [{"path": str(folder / "train.jsonl"), "format": "tokens"}],
    }
    config["batch"] = {"global_examples": 8, "micro_tokens": 2 * tokens}
    config["train"] = {"epochs": 1}
    config["optim"] = {"lr": 1e-6, **run.get("optim", {})}
    if "adapter" in run:
        config["adapter"] = run["adapter"]
    job.write_text(yaml.safe_dump(config))
    done = _train(job, folder / "run", {}, hide_gpu=device == "cpu", num_steps=WARM_STEPS + MEASURED_STEPS)
    if done["code"]:
        return {"error": done["error"]}
    return _measured(folder / "run", run["goal"], rate)


def _measured(run_dir: Path, goal: float, rate: float) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][WARM_STEPS:]
    plan = json.loads((run_dir / "plan.json").read_text())
    per_second = statistics.median(line["num_tokens"] / line["seconds"] for line in steps)
    planned = plan["memory_bytes"]["total"]
    flops_per_token = plan["flops"] / plan["num_tokens"]
    return {
        "optimizer": _optimizer_of(run_dir),
        "tokens_per_second": round(per_second),
        "goal": round(goal),
        "share_of_matrix_rate": round(per_second * flops_per_token / rate, 3),
        "peak_gb": round(max(line["peak_memory_bytes"] for line in steps) / 1e9, 2),
        "planned_gb": round(planned / 1e9, 2),
    }


def _optimizer_of(run_dir: Path) -> str:
    """Which optimizer the run had: it depends on the packages that are there."""
    return yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]["name"]


def _write_documents(path: Path, tokens: int, num: int) -> None:
    """Documents of one length; the last nine tenths are learned."""
    chance = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(num):
            ids = chance.integers(0, 256, tokens).tolist()
            mask = [int(i >= tokens // 10) for i in range(tokens)]
            file.write(json.dumps({"input_ids": ids, "mask": mask}) + "\n")


def race(out: Path, device: str, quick: bool, cases: list[str] | None, rows: Rows) -> dict[str, Any]:
    """The step against the peers, by `bench/step.py` on this device; `race.json` has all of it."""
    ok = True
    for case in cases or (("llama/alpaca",) if quick else RACES):
        command = [sys.executable, str(ROOT / "bench" / "step.py"), "--device", device, "--case", case]
        command += ["--add", str(out / "race.json")] + ["--quick"] * quick
        code, table, said = _followed(command)
        error = {"error": said[-LONGEST_ERROR:]} if code else {}
        rows.add({"run": case, "table": table[-4000:], **error})
        ok = ok and not error
    return {"ok": ok, "rows": rows.all}


def _followed(command: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; the latter is passed on as it comes, for when this is stopped."""
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stderr:  # what is printed besides is a table, which a pipe holds
            said.append(line)
            sys.stderr.write(line)
            sys.stderr.flush()
        table = process.stdout.read()
    return process.returncode, table, "".join(said)
