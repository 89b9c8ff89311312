"""The verbs: help that is fast and short, errors without tracebacks, the documented exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import burnish
from burnish.cli import main

VERBS = [
    "demo",
    "init",
    "check",
    "view",
    "plan",
    "train",
    "eval",
    "chat",
    "merge",
    "report",
    "ckpt",
    "doctor",
    "schema",
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(burnish.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "burnish", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source, "COLUMNS": "80"},
        check=False,
    )


def fails(capsys, *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return int(caught.value.code or 0), capsys.readouterr().err


def test_help_is_short_and_imports_nothing_heavy():
    begun = time.monotonic()
    done = run("--help")
    seconds = time.monotonic() - begun
    assert done.returncode == 0
    assert all(f" {verb} " in done.stdout for verb in VERBS), done.stdout
    assert len(done.stdout.splitlines()) <= 60
    assert seconds < 10  # under one on an idle machine; the next test is what keeps it so


def test_parsing_imports_nothing_heavy():
    code = (
        "import sys, burnish.cli; heavy = {'torch', 'transformers', 'peft', 'datasets', 'pyarrow'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    source = str(Path(burnish.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source})


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    try:
        main([verb, "--help"])
    except SystemExit as done:
        assert not done.code
    assert 3 < len(capsys.readouterr().out.splitlines()) <= 60


def test_help_all_lists_every_key(capsys):
    from burnish.config.names import all_keys

    main(["train", "--help-all"])
    text = capsys.readouterr().out
    assert all(f"--{key.name} " in text for key in all_keys())


def test_schema_is_json(capsys):
    try:
        main(["schema"])
    except SystemExit as done:
        assert not done.code
    assert json.loads(capsys.readouterr().out)["properties"]["model"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["trian"], 2, "train"),
        (["train", "no.yaml"], 2, "no such file"),
        (["train"], 2, "3 problems"),
        (["train", "--optim.lrr", "1"], 2, "Did you mean optim.lr?"),
        (["check", "no.yaml"], 2, "no such file"),
        (["plan", "--gpus", "many"], 2, "gpus"),
        (["report", "nowhere"], 2, "not a run"),
        (["merge", "nowhere", "out"], 2, "not an adapter"),
        (["ckpt", "ls", "nowhere"], 2, "no such folder"),
        (["init"], 2, "DATA"),
        (["init", "no.jsonl"], 2, "no file"),
        (["eval"], 2, "is missing"),
        (["eval", "some/model"], 2, "--data"),
    ],
)
def test_user_errors_are_one_message(argv, code, message, capsys):
    found, text = fails(capsys, *argv)
    assert (found, message in text) == (code, True), text
    assert "Traceback" not in text and text.startswith("burnish: ")


def test_from_a_shell_there_is_no_traceback_either():
    done = run("train", "no.yaml")
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_what_init_writes_is_taken_as_it_is(folder, capsys):
    from burnish.config.load import load_config

    rows = [{"instruction": "a" * 3000, "input": "", "output": "b"}] * 3
    Path("some data.json").write_text(json.dumps(rows))
    Path("b: c.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    try:
        main(["init", "some data.json", "b: c.jsonl", "--model", "org/name", "--out", "new/sft.yaml"])
    except SystemExit as done:
        assert not done.code
    assert "alpaca" in capsys.readouterr().out
    config = load_config(Path("new/sft.yaml"))
    assert [source.path for source in config.data.train] == ["some data.json", "b: c.jsonl"]
    assert config.data.max_tokens == 1024
    assert fails(capsys, "init", "some data.json", "--out", "new/sft.yaml")[0] == 2


def test_no_checkpoints_is_no_error(capsys):
    Path("run").mkdir()
    try:
        main(["ckpt", "ls", "run"])
    except SystemExit as done:
        assert not done.code
    assert "no checkpoints" in capsys.readouterr().out
