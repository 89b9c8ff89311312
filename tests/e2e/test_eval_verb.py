"""`burnish eval` measures what was trained, on what it was not trained on, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from burnish.config.load import load_config
from burnish.errors import ConfigError
from burnish.run import train
from burnish.scoring import score
from cluster.tiny_job import NUM_STEPS, write_tiny_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that is done; it held out a quarter of its rows."""
    path = write_tiny_job(tmp_path_factory.mktemp("job"))
    text = path.read_text().replace("chat_template", "eval_fraction: 0.25\n  chat_template")
    path.write_text(text)
    train(load_config(path, []))
    return path


def test_a_config_without_a_result_is_refused_and_never_its_starting_model(job: Path) -> None:
    data = [str(job.parent / "train.jsonl")]
    with pytest.raises(ConfigError) as caught:
        score([str(job), "--output_dir", str(job.parent / "mistyped")], data, False)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and str(job.parent / "mistyped" / "final") in message
    assert f"burnish train {job}" in message and "burnish eval MODEL --data FILE" in message


def test_the_output_names_the_model_that_was_evaluated(job: Path) -> None:
    data = [str(job.parent / "train.jsonl")]
    final = str(job.parent / "run" / "final")
    assert score([str(job)], data, False).splitlines()[0] == f"model: {final}"
    assert json.loads(score([final], data, True))["model"] == final


def test_the_rows_that_training_held_out_are_evaluated_as_training_did(
    job: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = (job.parent / "run" / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, metrics) if line["kind"] == "eval"][-1]
    found = json.loads(score([str(job)], [], True))
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found["num_supervised_tokens"] == last["num_supervised_tokens"] > 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    score([str(job), "--data.eval_fraction", "0.5"], [], True)
    assert "may have been trained on" in caplog.text


def test_without_evaluation_data_the_message_names_both_keys(job: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_fraction") as caught:
        score([str(job), "--data.eval_fraction", "0"], [], True)
    assert "--data FILE" in str(caught.value)


def test_the_line_names_the_models_step_and_counts_are_whole_numbers(job: Path, tmp_path: Path) -> None:
    data, final = [str(job.parent / "train.jsonl")], job.parent / "run" / "final"
    line = json.loads(score([str(job)], data, True))
    assert line["step"] == NUM_STEPS
    lines = [line, *map(json.loads, (job.parent / "run" / "metrics.jsonl").read_text().splitlines())]
    evals = [entry for entry in lines if entry["kind"] == "eval"]
    counts = [source["num_supervised_tokens"] for entry in evals for source in entry["sources"].values()]
    assert len(evals) > 1 and {type(count) for count in counts} == {int}

    shutil.copytree(final, tmp_path / "model")
    (tmp_path / "model" / "burnish.json").unlink()
    flags = ["--data.chat_template", "chatml"]
    odd = shutil.copy(data[0], tmp_path / 'held "out".jsonl')
    assert json.loads(score([str(tmp_path / "model"), *flags], [str(odd)], True))["step"] is None
