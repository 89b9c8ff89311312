"""The main job through the front door: train, kill, go on, export, load back, merge, generate."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.tiny_job import ENVIRONMENT, write_tiny_job

SECONDS = 240


def burnish(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "burnish", *map(str, arguments)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    process = burnish(*arguments)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code, err
    assert code == 0 or "Traceback" not in err
    return out, err


def lines(run_dir: Path, kind: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def numbers(run_dir: Path) -> list[tuple]:
    """What must be equal to the bit between two runs."""
    return [(x["step"], x["loss"], x["grad_norm"], x["lr"], x["num_tokens"]) for x in lines(run_dir)]


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and len(lines(run_dir)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came: {process.communicate()}")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    return write_tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def whole(job) -> Path:
    """One uninterrupted run of 40 steps with evaluation and checkpoints."""
    out = job.parent / "whole"
    run("train", job, *LONG, "--output_dir", out)
    return out


LONG = ["--train.max_steps", "40", "--checkpoint.every_steps", "4", "--checkpoint.resume", "auto"]
LONG += ["--data.eval_fraction", "0.2", "--eval.every_steps", "10", "--batch.global_examples", "4"]


def test_a_run_leaves_what_the_contract_says(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"config.yaml", "plan.json", "data_report.json", "metrics.jsonl", "checkpoints", "final"} <= names
    assert {"best", "report.html"} <= names
    plan = json.loads((whole / "plan.json").read_text())
    steps = lines(whole)
    assert plan["num_steps"] == len(steps) == 40
    for key in ("num_examples", "num_tokens", "num_supervised_tokens"):
        assert plan[key] == sum(step[key] for step in steps)
    assert plan["num_micro_batches"] == sum(step["num_micro_batches"] for step in steps)
    assert [e["step"] for e in lines(whole, "eval")] == [0, 10, 20, 30, 40]
    assert lines(whole, "eval")[-1]["loss"] < lines(whole, "eval")[0]["loss"]
    assert lines(whole)[-1]["loss"] < 0.5 * lines(whole)[0]["loss"]


def test_the_final_folder_loads_and_generates(whole):
    model = AutoModelForCausalLM.from_pretrained(whole / "final")
    tokenizer = AutoTokenizer.from_pretrained(whole / "final")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 and 4?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith("It is ")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    eos = model.generation_config.eos_token_id
    assert stop in ([eos] if isinstance(eos, int) else eos)
    assert json.loads((whole / "final/config.json").read_text()).get("use_cache") is not False


def test_killed_anywhere_it_goes_on_to_the_bit(job, whole):
    out = job.parent / "killed"
    for step in (6, 17):
        process = burnish("train", job, *LONG, "--output_dir", out)
        wait_for_step(process, out, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run("train", job, *LONG, "--output_dir", out)
    assert numbers(out) == numbers(whole)
    ours, theirs = (load_file(folder / "final/model.safetensors") for folder in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_asked_to_stop_it_saves_and_says_143(job, whole):
    out = job.parent / "asked"
    process = burnish("train", job, *LONG, "--output_dir", out)
    wait_for_step(process, out, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 143, process.communicate()
    ls, _ = run("ckpt", "ls", out)
    assert "step" in ls
    run("train", job, *LONG, "--output_dir", out)
    assert numbers(out) == numbers(whole)


def test_another_dataset_is_refused_and_named(job, whole):
    other = job.parent / "other.jsonl"
    other.write_text((job.parent / "train.jsonl").read_text().replace("Indeed", "Surely"))
    _, err = run("train", job, *LONG, "--output_dir", whole, "--data.train", other, code=4)
    assert "data" in err and "was" in err


@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_ranks_train_an_adapter_that_merges(job, stage):
    out = job.parent / f"adapter-{stage}"
    run(
        *("train", job, "--output_dir", out, "--adapter.rank", "4", "--adapter.alpha", "8"),
        *("--launch.num_processes", "2", "--engine.zero_stage", stage, "--optim.lr", "0.05"),
    )
    assert (out / "final/adapter_model.safetensors").exists()
    assert not list((out / "final").glob("model*.safetensors"))
    adapter = load_file(out / "final/adapter_model.safetensors")
    assert all(t.numel() and t.isfinite().all() for t in adapter.values())
    assert any(t.abs().max() > 0 for name, t in adapter.items() if "lora_B" in name)
    merged = job.parent / f"merged-{stage}"
    said, _ = run("merge", out / "final", merged, "--dtype", "fp32")
    assert "KL" in said
    ids = torch.tensor([[5, 9, 30, 41]])
    full = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    apart = AutoPeftModelForCausalLM.from_pretrained(out / "final")(ids).logits
    assert torch.allclose(full, apart, atol=1e-4)


def test_every_problem_of_a_config_at_once(job):
    _, err = run(
        "train", job, "--optim.learning_rate", "1e-4", "--train.epochs", "many", "--modle.path", "x", code=2
    )
    assert "optim.lr" in err and "train.epochs" in err and "model" in err


def test_bad_rows_say_where(job):
    bad = job.parent / "bad.jsonl"
    rows = (job.parent / "train.jsonl").read_text().splitlines()
    rows[3] = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}'
    rows[7] = '{"messages": [{"role": "us'
    bad.write_text("\n".join(rows) + "\n")
    _, err = run("check", job, "--data.train", bad, code=3)
    assert "bad.jsonl:4" in err and "bad.jsonl:8" in err
