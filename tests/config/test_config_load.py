"""The loader: values as people mean them, every problem at once, nothing swallowed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.config.elsewhere import NAMES_ELSEWHERE
from burnish.config.load import config_schema, dump_config, load_config
from burnish.config.names import all_keys, suggest
from burnish.config.yaml_text import read_yaml, write_yaml
from burnish.errors import ConfigError

MINIMAL = "model: {path: some/model}\ndata: {train: rows.jsonl}\noutput_dir: runs/a\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def load(text: str, *flags: str):
    path = Path("sft.yaml")
    path.write_text(text, encoding="utf-8")
    return load_config(path, flags)


def problems(text: str, *flags: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *flags)
    return {p.where: f"{p.what} / {p.cure}" for p in caught.value.problems}


def test_the_smallest_config_is_enough():
    config = load(MINIMAL)
    assert config.data.train[0].path == "rows.jsonl"
    assert config.optim.lr == 5e-6


def test_no_file_is_needed():
    flags = ["--model.path", "some/model", "--data.train", "rows.jsonl", "--output_dir=runs/a"]
    assert load_config(None, flags) == load(MINIMAL)


def test_numbers_and_words_are_what_people_mean():
    text = MINIMAL.replace("{train: rows.jsonl}", "{train: rows.jsonl, packing: on, max_tokens: 1_024}")
    config = load(text + "optim: {lr: 1e-4, eps: 1E-8, max_grad_norm: ~}\ntrain: {seed: 010}\n")
    assert config.optim.lr == 1e-4
    assert config.optim.max_grad_norm is None
    assert config.data.packing == "on"
    assert config.data.max_tokens == 1024
    assert config.train.seed == 10


def test_flags_win_and_the_last_flag_wins():
    config = load(
        MINIMAL + "optim: {lr: 1e-3}\n",
        *["--optim.lr", "1e-4", "--optim.lr=2e-5", "--adapter.rank", "8", "--model.trust-remote-code"],
        *["--model.revision", "1234567", "--data.train", "[rows.jsonl, {path: rows.jsonl, max_examples: 3}]"],
        *["--data.train.0.max_examples", "5", "--log.trackers", '["tensorboard", "wandb"]'],
    )
    assert config.optim.lr == 2e-5
    assert config.adapter is not None and config.adapter.rank == 8
    assert config.model.trust_remote_code
    assert config.model.revision == "1234567"
    assert [s.max_examples for s in config.data.train] == [5, 3]
    assert config.log.trackers == ("tensorboard", "wandb")


def test_a_flag_switches_an_adapter_off():
    assert load(MINIMAL + "adapter: {rank: 8}\n", "--adapter", "null").adapter is None


def test_every_problem_is_reported_at_once():
    found = problems(
        """
model: {path: some/model, dtype: bf17, revision: 17}
adapter:
lora: {rank: 5}
data:
  train: [missing.jsonl, {path: rows.jsonl, weigth: 2}]
  mix: weigted
learning_rate: 1e-4
optim: {lr: -1e-4, betas: [0.9], epochs: 3}
train: {epochs: true, seed: 1.5}
launch: {num_processes: many}
log: {trackers: [tensorbord]}
schedule: cosine
output_dir: runs/a
""",
        *["--model.init", "randm", "x", "--engine.zero_stage=5", "--batch.micro_tokens", ".inf", "--foo"],
    )
    assert "rows.jsonl" not in found
    assert "bf17" in found["model.dtype"] and "bf16, fp16, fp32" in found["model.dtype"]
    assert "sft.yaml:2" in found["model.dtype"]
    assert '"17"' in found["model.revision"]
    assert "left empty" in found["adapter"]
    assert "Did you mean adapter" in found["lora"]
    assert "missing.jsonl" in found["data.train[0]"]
    assert "weight" in found["data.train[1].weigth"]
    assert "weighted" in found["data.mix"]
    assert "optim.lr" in found["learning_rate"]
    assert "above 0" in found["optim.lr"]
    assert "2 values" in found["optim.betas"]
    assert "train.epochs" in found["optim.epochs"]
    assert "true" in found["train.epochs"]
    assert "whole number" in found["train.seed"]
    assert "auto" in found["launch.num_processes"]
    assert "tensorboard" in found["log.trackers[0]"]
    assert "section" in found["schedule"]
    assert "random" in found["model.init"]
    assert "0, 1, 2, 3" in found["engine.zero_stage"]
    assert "whole number" in found["batch.micro_tokens"]
    assert "no value" in found["--foo"]
    assert "alone" in found["x"]
    assert len(found) == 21


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.betas", "[1, 0.9]"), ("optim.betas", "[0.9, 1]"), ("launch.hang_timeout_seconds", "1e10")],
)
def test_a_value_that_torch_or_the_clock_would_choke_on_is_an_error_of_its_key(key, value):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"--{key}", value])
    assert any(problem.where.startswith(key) for problem in caught.value.problems)


def test_a_flag_that_cannot_be_read_says_how_to_write_it():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["--data.train", "[a.jsonl"])
    found = {problem.where: problem for problem in caught.value.problems}["--data.train"]
    assert found.what.startswith("[a.jsonl cannot be read: ") and "'[a.jsonl, b.jsonl]'" in found.cure


def test_a_config_behind_the_flags_is_told_where_it_belongs():
    with pytest.raises(ConfigError, match=r"sft.yaml: stands alone.*\n +A config stands first"):
        load_config(None, ["--optim.lr", "1", "sft.yaml"])


def test_a_wrong_key_hides_no_contradiction_of_others():
    with pytest.raises(ConfigError) as caught:
        given = ["--model.path", "some/model", "--data.train", "some/rows", "--output_dir", "runs/a"]
        load_config(None, [*given, "--e", "1", "--data.max_tokens", "1"])
    assert [problem.where for problem in caught.value.problems] == ["e", "data.max_tokens"]


def test_a_wrong_key_does_not_raise_false_contradictions():
    found = problems(
        MINIMAL.replace("rows.jsonl", "[{path: rows.jsonl, weight: 2}]") + "data.mix: weighted\n"
    )
    assert set(found) == {"data.mix"}
    assert "nested" in found["data.mix"]


def test_missing_keys_are_named():
    with pytest.raises(ConfigError) as caught:
        load_config(None, [])
    assert [p.where for p in caught.value.problems] == ["model.path", "data.train", "output_dir"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("lora.rank", "adapter.rank"),
        ("lora_alpha", "adapter.alpha"),
        ("optim.epochs", "train.epochs"),
        ("modle.path", "model.path"),
        ("data.max_length", "data.max_tokens"),
        ("per_device_train_batch_size", "batch.micro_examples"),
        ("engine.zero_stge", "engine.zero_stage"),
        ("data.train[].pth", "data.train[].path"),
        ("xyzzy", None),
        # Spelled like a key of ours, but something else where it comes from.
        ("pretrain", "model.path"),
        ("output_key", "data.train[].columns"),
        ("load_checkpoint", "checkpoint.resume"),
        ("dataset_dir", "data.train"),
        ("pad_token", None),
        ("streaming", None),
        ("do_train", None),
    ],
)
def test_did_you_mean(written, meant):
    assert suggest(written) == meant


def test_names_from_elsewhere_lead_to_keys_and_say_what_differs():
    known = {key.name for key in all_keys()} | {"adapter"}
    assert set(NAMES_ELSEWHERE.values()) <= known
    assert not known & NAMES_ELSEWHERE.keys()
    found = problems(
        MINIMAL,
        *["--gradient_accumulation_steps", "4", "--lora_model_dir", "x", "--group_by_length", "true"],
        *["--packing_samples", "--flash_attn"],
    )
    assert "batch.global_examples? A whole step: examples per GPU" in found["gradient_accumulation_steps"]
    assert "Did you mean adapter.path? One folder" in found["lora_model_dir"]
    assert "Not needed" in found["group_by_length"]
    assert "Did you mean data.packing?" in found["--packing_samples"]
    assert "Did you mean model.attention?" in found["--flash_attn"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("just a word\n", "one word"),
        ("model:\n\tpath: x\n", "tab"),
        ("a: [1, 2\n", "is not YAML"),
        ("a: 1\na: 2\n", "stands twice"),
        ("model: {path: a, path: b}\n", "stands twice"),
        ("a: 1\n---\nb: 2\n", "more than one"),
        ("a: !!python/object:os.system x\n", "is not YAML"),
        ("a: &x [*x]\n", "contains itself"),
        ("? [a, b]\n: 1\n", "a key must be a word"),
        ("1: 2\n", "a key must be a word"),
    ],
)
def test_files_that_are_no_config(text, message):
    found = problems(text)
    assert any(message in f"{where}: {what}" for where, what in found.items()), found


def test_bytes_that_are_no_text(folder):
    Path("sft.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(Path("sft.yaml"), [])
    with pytest.raises(ConfigError, match="Did you mean"):
        load_config(Path("stf.yaml"), [])
    with pytest.raises(ConfigError, match="is not a file"):
        load_config(folder, [])


def test_a_byte_order_mark_and_json_are_read():
    Path("a.json").write_text("\ufeff" + json.dumps(json.loads(json.dumps(read_yaml(MINIMAL, "x").value))))
    assert load_config(Path("a.json"), []) == load(MINIMAL)


def test_what_is_written_is_read_back():
    config = load(MINIMAL + "adapter: {targets: [q, v]}\nmodel.x: 1\n".replace("model.x: 1\n", ""))
    Path("again.yaml").write_text(dump_config(config))
    assert load_config(Path("again.yaml"), []) == config


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\ufeffa", " a", "a\n", "", "\t", "'", '"', "\x00"])
def test_odd_characters_survive(text):
    assert read_yaml(write_yaml({"key": text}), "x").value == {"key": text}


@settings(deadline=None)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists)
)
def test_yaml_round_trip(value):
    assert read_yaml(write_yaml({"key": value}), "x").value == {"key": value}


@given(
    st.sampled_from(
        ["1e-4", "on", "yes", "012", "1:30", "2024-01-01", "~", "null", "1_0", ".5", "<<", "0x1f"]
    )
)
def test_words_that_look_like_values_stay_words(text):
    assert read_yaml(write_yaml({"key": text}), "x").value == {"key": text}


def test_every_key_is_documented_and_the_set_is_frozen():
    keys = [key.name for key in all_keys()]
    assert len(keys) == len(set(keys)) <= 90
    assert all(key.doc.endswith(".") or key.doc.endswith(")") for key in all_keys()), keys
    frozen = Path(__file__).with_name("keys.txt").read_text().split()
    assert keys == frozen, "a key was added or removed: change tests/config/keys.txt on purpose"


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("data.max_tokens", "99999999999999999999", "at most 10^9"),
        ("batch.micro_tokens", "1000000001", "at most 10^9"),
        ("train.max_steps", "99999999999999999999999999", "at most 10^9"),
        ("train.epochs", "1e6", "at most 100,000"),
        ("train.seed", "1000000000000000000000", "from 0 to 10^18"),
    ],
)
def test_numbers_that_no_machine_holds_are_errors_of_their_key(key, value, most):
    assert most in problems(MINIMAL, f"--{key}", value)[key]


def test_every_whole_number_has_a_bound():
    keys = [key for key in all_keys() if key.takes.startswith("a whole number")]
    assert len(keys) > 10
    assert all("at most" in key.takes or " to " in key.takes for key in keys), keys


def test_the_schema_takes_the_short_forms():
    train = config_schema()["$defs"]["DataConfig"]["properties"]["train"]
    assert {"type": "string"} in train["anyOf"]
    assert json.dumps(config_schema())


def test_reading_a_config_needs_no_torch():
    code = (
        "import sys; from burnish.config.load import load_config; "
        "bad = {'torch', 'transformers', 'peft', 'deepspeed', 'datasets'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
