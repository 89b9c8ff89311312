"""The demonstration: held-out facts are asked for nowhere, and it ends as the README says."""

import pytest

from burnish.config.load import load_config
from burnish.config.yaml_text import write_yaml
from burnish.demo import show as module
from burnish.demo.texts import TOPICS, make_facts, make_questions, make_text
from burnish.errors import ConfigError


def test_no_training_question_asks_for_a_held_out_fact():
    facts = make_facts(0)
    train, held_out = make_questions(facts, 0, 24)
    assert len(held_out) == 24
    assert not {q.answer for q in train} & {q.answer for q in held_out}
    assert not {q.prompt for q in train} & {q.prompt for q in held_out}
    assert all(len(topic.values) == len(set(topic.values)) for topic in TOPICS.values())


def test_the_base_never_reads_a_question():
    text = " ".join(make_text(make_facts(0), 0, 500))
    assert "?" not in text and "Tell me" not in text


def test_its_configs_are_configs(tmp_path):
    (tmp_path / "text.jsonl").write_text("{}\n")
    for name in ("instructions.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "config.json").write_text("{}")
    for values in (
        module._base_config(tmp_path, tmp_path / "text.jsonl", tmp_path / "base"),
        module._tuning_config(tmp_path, tmp_path, tmp_path / "tuned"),
    ):
        file = tmp_path / "c.yaml"
        file.write_text(write_yaml(values))
        load_config(file)


def test_it_writes_over_nothing(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="something else"):
        module.show(tmp_path)


@pytest.mark.slow
def test_the_whole_demo(tmp_path, capsys):
    result = module.show(tmp_path / "demo")
    assert result.before < 0.1 and result.after >= 0.9
    assert result.seconds < 180
    out = capsys.readouterr().out
    assert "What to type next" in out
    assert (tmp_path / "demo" / "report.html").exists()
