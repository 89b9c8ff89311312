"""`burnish view` as a user types it."""

import json
import re

import pytest
from view_rig import chat, view_config

from burnish.cli import main
from burnish.config.load import dump_config


def run(*words):
    """The exit code of the verb."""
    with pytest.raises(SystemExit) as stopped:
        main(["view", *map(str, words)])
    return stopped.value.code


@pytest.fixture
def config_file(tmp_path):
    rows = [chat("Hi", "Hello there!"), chat("What?", ""), chat("Hi", "Paris")]
    path = tmp_path / "sft.yaml"
    path.write_text(dump_config(view_config(tmp_path, {"a": rows})))
    return path


def test_json_on_stdout_and_verdicts_on_stderr(config_file, capsys):
    assert run(config_file, "-n", "2", "--json") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["row"][-2:] for line in out.splitlines()] == [":1", ":3"]
    assert "[empty_answer]" in err


def test_the_terminal_without_colours_marks_what_is_trained(config_file, capsys):
    assert run(config_file) == 0
    assert "⟦Hello there!<|im_end|>⟧" in capsys.readouterr().out


def test_a_page(config_file, tmp_path, capsys):
    assert run(config_file, "--html", tmp_path / "view.html") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "view.html" in err
    assert "<title>What the model sees</title>" in (tmp_path / "view.html").read_text("utf-8")


def test_a_wrong_source_is_one_message_and_exit_code_2(config_file, capsys):
    assert run(config_file, "--source", "b") == 2
    assert re.search(r"no source 'b'", capsys.readouterr().err)


def test_a_page_that_cannot_be_written_is_exit_code_4(config_file, capsys):
    assert run(config_file, "--html", config_file / "view.html") == 4
    assert "view.html: cannot be written: " in capsys.readouterr().err
