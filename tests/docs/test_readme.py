"""The commands of the README do what it says, with a tiny model and data in place of real ones."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
]

TINY = ["--data.max_tokens", "128", "--train.max_steps", "2", "--batch.global_examples", "4"]
"""What makes a run of the README's small enough; flags win over the file."""

IN_ONE_PROCESS = """
import json, sys
from burnish.cli import main
for argv in json.loads(sys.argv[1]):
    print("$ burnish", *argv, flush=True)
    try:
        main(argv)
    except SystemExit as error:
        if error.code:
            sys.exit(f"{argv} ended with {error.code}")
"""


def _commands(verb: str) -> list[list[str]]:
    return [words[1:] for words in COMMANDS if words[:2] == ["burnish", verb]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands name: a base model, data, and configs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT / "tests" / "data"))
    from tokenizers_on_the_spot import byte_level

    from burnish.data.tokenizer import builtin_templates

    folder = tmp_path_factory.mktemp("readme")
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    tokenizer.chat_template = builtin_templates()["chatml"]
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(60)
    ]
    (folder / "data").mkdir()
    for name in ("data/train.jsonl", "data/chat.jsonl", "d.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows[::-1]).to_parquet(str(folder / "data" / "tools.parquet"))
    return folder


def _run(folder: Path, *commands: list[str]) -> str:
    """Run `burnish` commands, one after the other, with the tiny model for the README's."""
    real = {"meta-llama/Llama-3.1-8B": "base", "M": "base"}
    argvs = [[real.get(word, word) for word in argv] for argv in commands]
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(argvs)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_from_data_to_an_answer(place):
    """init, check, view, plan, launch, train and chat, as they stand."""
    train = next(argv for argv in _commands("train") if argv == ["train", "sft.yaml"])
    chat = _commands("chat")[0]
    steps = [argv for verb in ("init", "check", "view", "plan", "launch") for argv in _commands(verb)]
    out = _run(place, *steps, [*train, *TINY], [*chat, "--prompt", "Say 7", "--max-tokens", "4"])
    assert "data/train.jsonl: messages" in out and "memory" in out
    final = place / chat[1]
    assert (final / "model.safetensors").is_file() and (final / "tokenizer.json").is_file()
    left = {file.name for file in final.parent.iterdir()}
    named = re.findall(
        r"^  ([\w.]+)(/?) ", next(b for _, b in BLOCKS if b.startswith("runs/first/")), re.MULTILINE
    )
    always = {name for name, _ in named} - {"best", "checkpoints", "report.html"}
    assert always <= left, (always, left)


def test_the_config_that_is_shown_trains_and_merges(place):
    block = next(block for language, block in BLOCKS if language == "yaml" and "output_dir" in block)
    (place / "shown.yaml").write_text(block.replace("meta-llama/Llama-3.1-8B", "base"))
    flags = next(argv for argv in _commands("train") if "--optim.lr" in argv)
    merge = re.search(r"`burnish (merge [^`]+)`", README)
    assert merge is not None
    out = _run(
        place, ["train", "shown.yaml", *flags[2:], *TINY], shlex.split(merge[1]), ["report", "runs/first"]
    )
    assert "runs/first/final" in out
    assert (place / "runs/first/final/adapter_model.safetensors").is_file()
    assert (place / "out" / "model.safetensors").is_file() and (place / "runs/first/report.html").is_file()


def test_a_run_without_a_file(place):
    bare = next(argv for argv in _commands("train") if "--model.path" in argv)
    bare = ["bare" if word == "out" else word for word in bare]  # the other test's merge has that name
    _run(place, [*bare, *TINY])
    assert (place / "bare" / "final" / "model.safetensors").is_file()


def test_every_command_is_known():
    """Every line of a bash block is one that a test runs, or one for the shell alone."""
    verbs = {words[1] for words in COMMANDS if words[:1] == ["burnish"]}
    assert verbs == {"init", "check", "view", "plan", "launch", "train", "chat"}
    others = {tuple(words[:2]) for words in COMMANDS if words and words[0] != "burnish"}
    assert others <= {
        ("make", "demo"),
        ("make", "test"),
        ("pip", "install"),
        ("torchrun", "--nproc-per-node"),
        ("srun", "--nodes"),
    }


def test_make_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "bench/README.md",
    ]
    for page in pages:
        named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", page.read_text("utf-8"), re.MULTILINE))
        for target in (a or b for a, b in named):
            assert target in targets, f"{page.name} names make {target}"
