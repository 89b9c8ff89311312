"""`burnish eval` measures what was trained, on what it was not trained on, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file

from burnish.config.load import load_config
from burnish.errors import ConfigError, InterruptedRunError
from burnish.export import merge
from burnish.preview import check_data
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


@pytest.fixture(scope="module")
def adapter(job: Path) -> Path:
    """An adapter of the job's result, with rows for a token of its own."""
    out = job.parent / "adapter"
    flags = ["--adapter.rank=2", "--adapter.dropout=0.1", "--model.add_tokens=[kWh]"]
    base = [f"--model.path={job.parent / 'run/final'}", "--model.init=pretrained"]
    train(load_config(job, [*base, *flags, f"--output_dir={out}"]))
    return out / "final"


def going_on(job: Path, adapter: Path, *flags: str) -> list[str]:
    base = [f"--model.path={job.parent / 'run/final'}", "--model.init=pretrained"]
    return [*base, f"--adapter.path={adapter}", "--model.freeze=[lora_A]", *flags]


def test_a_run_that_begins_with_an_adapter_begins_where_its_evaluation_ended(
    job: Path, adapter: Path, tmp_path: Path
) -> None:
    out = train(load_config(job, going_on(job, adapter, f"--output_dir={tmp_path / 'run'}")))
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    first, *_, last = (line for line in lines if line["kind"] == "eval")
    for model, line in ((adapter, first), (out, last)):
        found = json.loads(score([str(model.parent / "config.yaml")], [], True))
        assert found["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert first["loss"] != pytest.approx(last["loss"], rel=1e-3)
    given, trained = (load_file(place / "adapter_model.safetensors") for place in (adapter, out))
    assert given.keys() == trained.keys() and any("token_adapter" in name for name in given)
    for name, weight in given.items():
        stays = "lora_A" in name or "embed_tokens" in name  # frozen; and no row has the token
        assert torch.equal(weight, trained[name]) is stays, name
    assert AutoPeftModelForCausalLM.from_pretrained(out).peft_config["default"].r == 2
    assert merge(out, tmp_path / "merged", "fp32").same_top_token == 1
    assert "begun with the adapter: `adapter`" in (out / "README.md").read_text()


def test_a_stopped_run_goes_on_and_does_not_begin_again(
    job: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (going_on(job, adapter, f"--output_dir={tmp_path / name}") for name in ("whole", "cut"))
    train(load_config(job, whole))
    saving = [*cut, "--checkpoint.every_steps=2", "--checkpoint.resume=auto"]
    from burnish.checkpoint.commit import save_checkpoint

    def saved_and_stopped(*arguments, **named):
        save_checkpoint(*arguments, **named)
        raise InterruptedRunError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr("burnish.train.loop.save_checkpoint", saved_and_stopped)
        with pytest.raises(InterruptedRunError):
            train(load_config(job, saving))
    train(load_config(job, saving))
    ours, theirs = (
        load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("cut", "whole")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_of_other_weights_is_refused_before_training(
    job: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    names = [name for name in sorted(weights) if "lora" in name]
    lost = weights.pop(names[0])
    weights |= {"base_model.model.stray.lora_A.weight": lost.clone(), names[1]: torch.zeros(3)}
    save_file(weights, file)
    config = load_config(job, going_on(job, folder, f"--output_dir={tmp_path / 'run'}"))
    for refuses in (check_data, train):
        with pytest.raises(ConfigError) as caught:
            refuses(config)
        missing, stray, size = (problem.what for problem in caught.value.problems)
        assert "missing" in missing and names[0] in missing
        assert "stray" in stray and f"{names[1]} [3] instead of" in size
    assert not (tmp_path / "run").exists()
