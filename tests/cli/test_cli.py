"""The verbs: help that is fast and short, errors without tracebacks, the documented exit codes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import burnish
from burnish import preview
from burnish.cli import main
from burnish.config.plan_options import PlanOptions
from burnish.errors import ConfigError
from cluster.tiny_job import write_tiny_job

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


REST = ["--model.path", "a/b", "--output_dir", "out"]


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
        (["eval", "no.yaml", "--data", "d.jsonl"], 2, "no such file"),
        (["eval", "nosuch"], 2, "nosuch: there is no such file or folder"),
        (["eval", "some/model", "--data", "no.jsonl"], 2, "--data: there is no file or folder no.jsonl"),
        (["chat", "some/model", "--max-tokens", "0"], 2, "--max-tokens: is 0\n    Give at least 1."),
        (["chat", "some/model", "--max-tokens=-5"], 2, "--max-tokens: is -5"),
        (["doctor", "--ranks", "0"], 2, "--ranks: is 0"),
        (["train", "--data.train", "x" * 300, *REST], 2, "longer than a file's name may be"),
        (["train", "--adapter.path", "x" * 300, "--data.train", "d", *REST], 2, "longer than a file's name"),
        (["report", "x" * 300], 2, "longer than a file's name may be"),
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


@pytest.mark.parametrize("has_template", [True, False])
def test_init_knows_a_tokenizer_without_a_template(has_template, capsys):
    from burnish.config.load import load_config

    Path("rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    Path("base/tokenizer.json").write_text("{}")
    Path("base/tokenizer_config.json").write_text('{"chat_template": "x"}' if has_template else "{}")
    with contextlib.suppress(SystemExit):
        main(["init", "rows.jsonl", "--model", "base", "--out", "sft.yaml"])
    config = load_config(Path("sft.yaml"))
    assert config.data.chat_template == (None if has_template else "chatml")
    assert tuple(config.model.add_tokens) == (() if has_template else ("<|im_start|>", "<|im_end|>"))


@pytest.mark.parametrize("verb", ["ls", "verify", "prune"])
def test_a_folder_that_is_no_run_has_no_checkpoints_to_speak_of(verb, capsys):
    Path("model").mkdir()
    code, text = fails(capsys, "ckpt", verb, "model")
    assert (code, "model: is not a run" in text, "output_dir" in text) == (2, True, True), text


@pytest.mark.parametrize("verb", [["chat"], ["eval", "--data", "d.jsonl"], ["eval"]])
def test_a_run_where_its_result_is_meant_names_the_result(verb, capsys):
    Path("run/final").mkdir(parents=True)
    code, text = fails(capsys, verb[0], "run", *verb[1:])
    assert (code, f"is a run, not a model\n    Give its result: {Path('run/final')}." in text) == (2, True), (
        text
    )
    Path("run/final").rmdir()
    assert "neither config.json nor adapter_config.json" in fails(capsys, verb[0], "run", *verb[1:])[1]


def test_a_checkpoint_where_a_model_is_meant_says_how_to_make_one(capsys):
    job, folder = write_tiny_job(Path("job")), Path("run/checkpoints/step-00000002")
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{}")
    for words in (["chat", str(folder)], ["check", str(job), "--model.path", str(folder)]):
        code, text = fails(capsys, *words)
        assert (code, "checkpoint.resume: CHECKPOINT, train.max_steps" in text) == (2, True), text
    Path("run/final").mkdir()
    code, text = fails(capsys, "check", str(job), "--model.path", "run")
    assert (code, f"Give its result: {Path('run/final')}." in text) == (2, True), text


def test_one_bad_row_is_counted_as_one(capsys):
    job = write_tiny_job(Path("job"))
    data = Path("job/train.jsonl")
    data.write_text(data.read_text() + '{"messages": []}\n')
    code, text = fails(capsys, "check", str(job))
    assert (code, text.splitlines()[0]) == (3, "burnish: 1 row that cannot be trained on, 1 rule broken:"), (
        text
    )
    data.write_text(data.read_text() + '{"messages": []}\n' * 30 + "{\n")
    text = fails(capsys, "check", str(job))[1]
    assert text.startswith("burnish: 32 rows that cannot be trained on, 2 rules broken:\n"), text
    assert "... and 12 more rows" in text and "empty_messages: 31 rows: " in text


@pytest.mark.parametrize("argv", [["schema"], ["view", "job/sft.yaml"]])
def test_a_closed_pipe_ends_quietly(argv):
    write_tiny_job(Path("job"))
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "burnish", *argv],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(burnish.__file__).parents[1])},
        check=False,
    )
    os.close(writing)
    assert (done.returncode, "Traceback" in done.stderr, "Exception" in done.stderr) == (0, False, False), (
        done
    )


@pytest.mark.parametrize(
    ("closing", "argv", "code"),
    [
        ("<&- >&- 2>&-", "schema", 0),
        (">&-", "report nowhere", 2),
        ("2>&-", "report nowhere", 2),
    ],
)
def test_streams_that_were_closed_lead_nowhere(closing, argv, code):
    command = f"{sys.executable} -m burnish {argv} {closing}"
    environment = {**os.environ, "PYTHONPATH": str(Path(burnish.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (code, "", False), done


def test_a_stdout_that_knows_only_ascii_is_no_error(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("check", str(write_tiny_job(Path("job"))))
    assert done.returncode == 0 and r"\xb7" in done.stdout, done


def test_no_checkpoints_is_no_error(capsys):
    Path("run").mkdir()
    Path("run/plan.json").write_text("{}")
    try:
        main(["ckpt", "ls", "run"])
    except SystemExit as done:
        assert not done.code
    assert "no checkpoints" in capsys.readouterr().out


def test_eval_of_a_misspelt_config_names_the_right_one(capsys):
    Path("sft.yaml").write_text("output_dir: a\n")
    code, text = fails(
        capsys, "eval", "sftt.yaml", "--data", "d.jsonl"
    )  # neither is there: the config is first
    assert (code, "Did you mean sft.yaml?" in text) == (2, True), text


def test_what_cannot_be_written_is_one_message_and_exit_code_4(capsys):
    Path("file").write_text("")
    Path("data.jsonl").write_text('{"text": "a"}\n')
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("sft.yaml").write_text("{model: {path: model}, data: {train: data.jsonl}, output_dir: run}\n")
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("")
    for argv in (
        ["init", "data.jsonl", "--out", "file/sft.yaml"],
        ["init", "data.jsonl", "--force", "--out", "model"],
        ["launch", "slurm", "sft.yaml", "--out", "file/job"],
        ["launch", "slurm", "sft.yaml", "--out", "model"],
        ["report", "run", "--out", "file/page.html"],
        ["report", "run", "--out", "model"],
        ["demo", "--out", "file/demo"],
        ["demo", "--out", "file"],
    ):
        code, text = fails(capsys, *argv)
        assert (code, f"{argv[-1]}: cannot be written: " in text) == (4, True), text
    assert [path.name for path in Path().glob(".*")] == []  # no staged page is left


@pytest.mark.parametrize("verb", ["check", "train"])
def test_an_output_dir_that_cannot_be_made_is_said_before_anything_is_loaded(verb, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "burnish.data.prepare", None)  # whoever loads data fails otherwise
    Path("file").write_text("")
    Path("data.jsonl").write_text('{"text": "a"}\n')
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("sft.yaml").write_text("{model: {path: model}, data: {train: data.jsonl}, output_dir: file/run}\n")
    before = sorted(Path().rglob("*"))
    code, text = fails(capsys, verb, "sft.yaml")
    assert (code, text.startswith("burnish: output_dir: file/run cannot be written: Not a dir")) == (4, True)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("verb", ["train", "chat"])
def test_running_out_of_memory_is_the_machine_and_has_a_cure(verb, capsys, monkeypatch):
    """torch's own errors: a real one of the CPU's allocator, and the class of the GPU's."""
    import torch

    from burnish import cli

    def too_much() -> None:
        torch.empty(2**52, dtype=torch.uint8)

    def too_much_for_a_gpu() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")

    def too_much_for_python() -> None:
        raise MemoryError

    cure = "batch.micro_tokens" if verb == "train" else "more of it"
    for run in (too_much, too_much_for_a_gpu, too_much_for_python):
        monkeypatch.setattr(cli, "app", lambda *_, run=run, **__: run())
        code, text = fails(capsys, verb)
        assert (code, "out of memory: " in text, cure in text) == (4, True, True), text


def test_other_errors_stay_errors(monkeypatch):
    from burnish import cli

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("The size of tensor a must match")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(RuntimeError, match="must match"):
        main(["train"])


def test_a_full_disk_anywhere_is_the_machine(capsys, monkeypatch):
    """As where metrics are written: /dev/full says ENOSPC."""
    from burnish import cli

    monkeypatch.setattr(cli, "app", lambda *_, **__: Path("/dev/full").write_text("a"))
    code, text = fails(capsys, "train")
    assert (code, "No space left" in text) == (4, True), text


@pytest.mark.parametrize(
    ("flags", "option"),
    [(["--gpus", "0"], "--gpus"), (["--gpus=-1"], "--gpus"), (["--mfu", "0"], "--mfu")],
)
def test_a_plan_for_no_gpus_is_refused(flags, option, capsys):
    Path("data.jsonl").write_text('{"text": "a"}\n')
    config = ["--model.path", "some/model", "--data.train", "data.jsonl", "--output_dir", "run"]
    code, text = fails(capsys, "plan", *config, *flags)
    assert (code, text.startswith(f"burnish: {option}: is ")) == (2, True), text


@pytest.mark.parametrize("size", ["80", " 80 ", "1.5"])
def test_a_gpu_s_memory_needs_a_unit(size):
    number = size.strip()
    with pytest.raises(ConfigError, match=f"{number}GB or {number}GiB"):
        preview._device(PlanOptions(gpu_memory=size))


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("80GB", 80 * 10**9),
        ("24 gib", 24 * 2**30),
        ("10MB", 10**7),
        ("512MiB", 2**29),
        ("1.5g", 1_500_000_000),
    ],
)
def test_a_gpu_s_memory_is_read_with_its_unit(size, num_bytes):
    device = preview._device(PlanOptions(gpu_memory=size))
    assert device is not None and device.memory_bytes == num_bytes


@pytest.mark.parametrize("size", ["", "0GB", "1.2.3GB", "GB", "80XB", "-80GB", f"{10**400}GB"])
def test_a_gpu_s_memory_that_is_none_is_refused(size):
    with pytest.raises(ConfigError, match="80GB, 24GiB, or one of"):
        preview._device(PlanOptions(gpu_memory=size))


def test_a_template_that_refuses_a_system_message_is_said_with_a_cure():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from burnish.errors import ConfigError
    from burnish.talk import Speaker

    speaker = Speaker.__new__(Speaker)  # without a model: it is never asked
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    speaker._tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=refusing
    )
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ConfigError, match=r"no system role\n.*Leave --system out"):
        speaker.answer([turns])
