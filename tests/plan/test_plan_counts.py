"""What `plan` says before a run is what the run does: steps, examples, tokens, micro-batches, exactly."""

import json
from pathlib import Path

import pytest
import yaml

from burnish.config.load import load_config
from burnish.launch import launch
from burnish.plan import Plan
from burnish.preview import plan_run
from burnish.run import train
from cluster.tiny_job import write_tiny_job

SUMS = ("num_examples", "num_tokens", "num_supervised_tokens", "num_micro_batches")
MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "state_size": 4,
    "num_hidden_layers": 2,
}

CASES = {
    "epochs": {"train": {"epochs": 2.5, "max_steps": None}},
    "max_steps": {"train": {"max_steps": 7}},
    "weighted": {"data": {"mix": "weighted"}, "train": {"max_steps": None}},
    "held out": {"data": {"eval_fraction": 0.2}, "train": {"epochs": 2, "max_steps": None}},
    "global tokens": {"batch": {"global_examples": None, "global_tokens": 700}, "train": {"max_steps": None}},
    "padded": {"data": {"packing": "off"}},
    "padded by examples": {
        "data": {"packing": "off"},
        "batch": {"micro_tokens": "auto", "micro_examples": 2},
    },
    "auto": {"batch": {"micro_tokens": "auto"}, "model": {"activation_checkpointing": "auto"}},
    "cannot be packed": {"architecture": MAMBA},
    "another attention": {"model": {"attention": "eager"}},
}


def write_job(folder: Path, changes: dict) -> Path:
    """The tiny job with some keys changed, and a second source where sources are weighted."""
    path = write_tiny_job(folder)
    config = yaml.safe_load(path.read_text())
    for section, keys in changes.items():
        if section == "architecture":
            file = folder / "model" / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | keys))
        else:
            config[section] = config.get(section, {}) | keys
    if config["data"].get("mix") == "weighted":
        rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
        (folder / "more.jsonl").write_text("".join(rows[5:12]))
        sources = [{"path": "train.jsonl", "weight": 0.25}, {"path": "more.jsonl", "weight": 0.75}]
        config["data"]["train"] = [source | {"path": str(folder / source["path"])} for source in sources]
    path.write_text(yaml.safe_dump(config))
    return path


def require_equal(planned: Plan, run_dir: Path) -> None:
    told, kept = planned.to_dict(), json.loads((run_dir / "plan.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert kept == told  # counts, memory, checkpoints: everything
    assert len(steps) == told["num_steps"]
    for name in SUMS:
        assert sum(step[name] for step in steps) == told[name], name
    assert max(step["num_micro_batches"] for step in steps) == told["micro_batches_per_step_max"]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == told["eval_steps"]


@pytest.mark.parametrize("case", CASES)
def test_a_run_does_what_was_planned(case, tmp_path, monkeypatch) -> None:
    for module in ("runtime", "host_memory"):  # the same for both
        monkeypatch.setattr(f"burnish.{module}.free_memory_bytes", lambda: 8 * 10**9)
    path = write_job(tmp_path, CASES[case])
    planned = plan_run(load_config(path, []))
    train(load_config(path, []))
    require_equal(planned, tmp_path / "run")
    assert planned.counts.packed == (case not in {*filter(lambda n: "pad" in n, CASES), "another attention",
                                                  "cannot be packed"})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_so_does_a_run_of_two_ranks(size, tmp_path) -> None:
    import os
    import sys

    from cluster.tiny_job import ENVIRONMENT

    engine = {"kind": "deepspeed", "zero_stage": 1, "sequence_parallel": size}
    path = write_job(tmp_path, {"engine": engine, "launch": {"num_processes": 2}})
    planned = plan_run(load_config(path, []))
    assert planned.counts.world_size == 2 // size
    os.environ.update(ENVIRONMENT)
    assert launch(2, [sys.executable, "-m", "burnish", "train", str(path)]) == 0
    require_equal(planned, tmp_path / "run")
