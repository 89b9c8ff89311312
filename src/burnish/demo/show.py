"""`burnish demo`: base model, instructions, the real `train`, and answers before and after."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.config.load import load_config
from burnish.demo.blank import make_blank
from burnish.demo.texts import Question, make_facts, make_questions, make_text
from burnish.errors import ConfigError, Problem, writing
from burnish.metrics.lines import read_lines

SEED = 0
NUM_TEXT_ROWS = 7000
NUM_REPLAYED = 200
NUM_HELD_OUT = 24
NUM_SHOWN = 5
_MARKER = ".burnish-demo"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    before: float
    """Exact matches on held-out prompts by the base model, as a share."""
    after: float
    seconds: float


def show(out: Path) -> DemoResult:
    """Run the whole demonstration under `out`.

    Raises:
        ConfigError: `out` holds something else.
        MachineError: `out` cannot be written.
    """
    import torch

    started = time.monotonic()
    # Tensors this small gain nothing from more threads, and lose much where cores are shared.
    torch.set_num_threads(1)
    _make_room(out)
    _say("1. A base model: a tokenizer and a small Llama, trained here on plain text made on the spot.")
    train_questions, held_out = _write_data(out)
    blank, data = out / "blank", out / "data"
    _train(out / "base.yaml", _base_config(blank, data / "text.jsonl", out / "base"))
    base = out / "base" / "final"
    _say("\n2. What the base answers to held-out prompts. It has read the facts, but never seen a question.")
    before = _answers(base, held_out)
    _print_answers(held_out, before, NUM_SHOWN)
    _say(f"\n3. Fine-tuning on {len(train_questions)} instructions: burnish train {out / 'sft.yaml'}")
    _train(out / "sft.yaml", _tuning_config(base, data, out / "tuned"))
    _say("\n4. The same prompts afterwards. No training prompt asks for these facts in any wording.")
    after = _answers(out / "tuned" / "final", held_out)
    _print_answers(held_out, after, NUM_SHOWN)
    result = DemoResult(_share(held_out, before), _share(held_out, after), time.monotonic() - started)
    _report(out, held_out, before, after)
    _say("\n" + _summary(out, result))
    return result


def _make_room(out: Path) -> None:
    with writing(out):
        if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
            raise ConfigError(Problem("--out", f"{out} holds something else", "Give an empty or new folder."))
        for name in ("blank", "data", "base", "tuned"):
            shutil.rmtree(out / name, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARKER).touch()


def _write_data(out: Path) -> tuple[list[Question], list[Question]]:
    facts = make_facts(SEED)
    texts = make_text(facts, SEED, NUM_TEXT_ROWS)
    train, held_out = make_questions(facts, SEED, NUM_HELD_OUT)
    assert not {q.prompt for q in train} & {q.prompt for q in held_out}
    (out / "data").mkdir()
    _write_lines(out / "data" / "text.jsonl", ({"text": text} for text in texts))
    _write_lines(out / "data" / "instructions.jsonl", map(_as_messages, train))
    _write_lines(out / "data" / "held_out.jsonl", map(_as_messages, held_out))
    make_blank(out / "blank", [*texts[:1000], *(q.prompt for q in train)])
    return train, held_out


def _as_messages(question: Question) -> dict[str, Any]:
    user = {"role": "user", "content": question.prompt}
    return {"messages": [user, {"role": "assistant", "content": question.answer}]}


def _base_config(blank: Path, text: Path, output_dir: Path) -> dict[str, Any]:
    """Continued pre-training, as it is called where the model is not fresh: every token is learned."""
    return {
        "model": {"path": str(blank), "init": "random", "dtype": "fp32"},
        "data": {"train": str(text), "train_on": "all", "max_tokens": 128},
        "batch": {"global_examples": 64},
        "optim": {"lr": 4e-3},
        "schedule": {"warmup_ratio": 0.05},
        "checkpoint": {"resume": "never"},
        "output_dir": str(output_dir),
    }


def _tuning_config(base: Path, data: Path, output_dir: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(base), "dtype": "fp32"},
        "data": {
            # A little of the base's text goes along, so that it does not forget while it learns to answer.
            "train": [
                {"path": str(data / "instructions.jsonl")},
                {"path": str(data / "text.jsonl"), "max_examples": NUM_REPLAYED},
            ],
            "eval": str(data / "held_out.jsonl"),
            "max_tokens": 128,
        },
        "batch": {"global_examples": 32},
        "optim": {"lr": 6e-4},
        "schedule": {"warmup_ratio": 0.05},
        "train": {"epochs": 16},
        "eval": {"every_steps": 124},
        "checkpoint": {"every_steps": 248, "resume": "never"},
        "output_dir": str(output_dir),
    }


def _train(file: Path, values: Mapping[str, Any]) -> None:
    """Write the config a user would write, read it as a user's, and train as `burnish train` does."""
    from burnish.config.yaml_text import write_yaml
    from burnish.run import train

    file.write_text(write_yaml(values), encoding="utf-8")
    train(load_config(file, []))


def _answers(model: Path, questions: Sequence[Question]) -> list[str]:
    from burnish.talk import Speaker

    speaker = Speaker(str(model), max_tokens=16)
    return speaker.answer([[{"role": "user", "content": q.prompt}] for q in questions])


def _share(questions: Sequence[Question], answers: Sequence[str]) -> float:
    right = sum(q.answer == answer for q, answer in zip(questions, answers, strict=True))
    return right / len(questions)


def _print_answers(questions: Sequence[Question], answers: Sequence[str], count: int) -> None:
    for question, answer in list(zip(questions, answers, strict=True))[:count]:
        mark = "right" if question.answer == answer else "wrong"
        _say(f"   {question.prompt:<46} {mark}  {answer}")
    _say(f"   exact match on all {len(questions)} held-out prompts: {_share(questions, answers):.0%}")


def _report(out: Path, questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> None:
    rows = [
        {"prompt": q.prompt, "answer": q.answer, "before": old, "after": new}
        for q, old, new in zip(questions, before, after, strict=True)
    ]
    _write_lines(out / "answers.jsonl", rows)
    from burnish.report.run_report import write_report

    write_report(out / "tuned", out / "report.html", answers=rows)


def _summary(out: Path, result: DemoResult) -> str:
    losses = [line["loss"] for line in read_lines(out / "tuned" / "metrics.jsonl") if line["kind"] == "eval"]
    tuned = out / "tuned"
    return "\n".join(
        [
            f"Held-out exact match {result.before:.0%} before, {result.after:.0%} after; "
            f"held-out loss {losses[0]:.3f} before, {losses[-1]:.3f} after; {result.seconds:.0f} s.",
            "",
            f"  the model      {tuned / 'final'}   (an ordinary Hugging Face folder)",
            f"  the config     {out / 'sft.yaml'}",
            f"  the numbers    {tuned / 'metrics.jsonl'}",
            f"  the report     {out / 'report.html'}",
            "",
            "What to type next:",
            f"  burnish chat {tuned / 'final'} --prompt 'Where does Ada live?'",
            f"  burnish view {out / 'sft.yaml'}",
            f"  burnish train {out / 'sft.yaml'} --output_dir {out / 'again'} --optim.lr 1e-3",
            "  burnish init YOUR_DATA.jsonl --model YOUR_MODEL",
        ]
    )


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - what the verb is for
