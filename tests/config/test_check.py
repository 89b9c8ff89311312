"""Contradictions between keys, one by one, and configs that look odd and are right."""

import json
from pathlib import Path

import pytest

from burnish.config.adapter_file import doubt_about_base
from burnish.config.load import dump_config, load_config
from burnish.errors import ConfigError

BASE = ["--model.path", "some/model", "--data.train", "rows.jsonl", "--output_dir", "runs/a"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("empty").mkdir()
    Path("chat.jinja").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "where", "message"),
    [
        ("--adapter.quantize nf4 --engine.zero_stage 3", "adapter.quantize", "zero_stage 3"),
        ("--adapter.quantize nf4 --adapter.kind pissa", "adapter.quantize", "own weights"),
        ("--adapter.quantize nf4 --model.init random", "adapter.quantize", "model.init: random"),
        ("--engine.offload_params cpu", "engine.offload_params", "ZeRO 3"),
        ("--engine.offload_optimizer cpu --engine.zero_stage 0", "engine.offload_optimizer", "ZeRO 1"),
        ("--engine.kind local --engine.offload_optimizer cpu", "engine.offload_optimizer", "local"),
        ("--engine.offload_optimizer nvme", "engine.offload_optimizer", "needs ZeRO 3"),
        (
            "--engine.zero_stage 3 --engine.offload_params nvme --engine.offload_optimizer nvme "
            "--model.dtype fp32",
            "engine.offload_params",
            "rounds weights to bf16",
        ),
        (
            "--engine.zero_stage 3 --engine.offload_optimizer cpu --launch.num_processes 1 "
            "--adapter.quantize nf4",
            "adapter.quantize",
            "does not work with engine.zero_stage 3",
        ),
        ("--engine.zero_stage 3 --engine.offload_params nvme", "engine.offload_params", "which is larger"),
        ("--engine.nvme_path /fast --engine.offload_optimizer cpu", "engine.nvme_path", "nothing is"),
        (
            "--engine.deepspeed.zero_optimization.reduce_bucket_sise 5",
            "engine.deepspeed.zero_optimization.reduce_bucket_sise",
            "reduce_bucket_size",
        ),
        ("--model.mlp_tile_tokens 512 --train.router_aux_loss 0.1", "model.mlp_tile_tokens", "balance"),
        ("--data.packing on --model.attention sdpa", "data.packing", "attention: sdpa"),
        ("--data.share_prefix on --batch.micro_examples 4", "data.share_prefix", "micro_examples"),
        ("--data.share_prefix on --train.neftune_alpha 5", "data.share_prefix", "noise"),
        ("--data.share_prefix on --model.attention eager", "data.share_prefix", "our attention"),
        ("--model.compile true --model.mlp_tile_tokens 512", "model.compile", "mlp_tile_tokens"),
        ("--model.compile true --engine.sequence_parallel 2", "model.compile", "sequence_parallel"),
        ("--model.compile true --model.activation_checkpointing light", "model.compile", "by itself"),
        ("--model.compile true --engine.zero_stage 3 --launch.num_processes 2", "model.compile", "gathers"),
        ("--engine.hpz_size 2", "engine.hpz_size", "ZeRO 3"),
        ("--engine.hpz_size 2 --engine.zero_stage 3 --engine.kind local", "engine.hpz_size", "sharded"),
        ("--engine.kind local --engine.deepspeed.dump_state true", "engine.deepspeed", "does not run here"),
        ("--engine.sequence_parallel 2 --launch.num_processes 3", "engine.sequence_parallel", "divide"),
        ("--engine.sequence_parallel 2 --data.packing off", "engine.sequence_parallel", "packing"),
        ("--engine.sequence_parallel 2 --model.attention sdpa", "engine.sequence_parallel", "auto"),
        ("--engine.sequence_parallel 2 --train.neftune_alpha 5", "engine.sequence_parallel", "neftune"),
        ("--engine.sequence_parallel 2 --train.router_aux_loss 0.1", "engine.sequence_parallel", "router"),
        ("--batch.global_examples 8 --batch.global_tokens 9999", "batch.global_tokens", "together"),
        ("--batch.micro_tokens 8192 --batch.micro_examples 2", "batch.micro_examples", "together"),
        ("--optim.name adafactor --engine.kind deepspeed", "optim.name", "whole matrices"),
        ("--optim.name adafactor --launch.num_processes 2", "optim.name", "engine.zero_stage: 0"),
        ("--optim.name muon --engine.offload_optimizer cpu", "optim.name", "not supported with"),
        (
            "--optim.name muon --engine.kind deepspeed --engine.offload_optimizer cpu",
            "optim.name",
            "not supported",
        ),
        (
            "--schedule.name wsd --schedule.warmup_ratio 0.6 --schedule.decay_ratio 0.5",
            "schedule.decay_ratio",
            "more than all steps",
        ),
        ("--model.freeze ['*']", "model.freeze", "everything"),
        ("--data.max_tokens 1", "data.max_tokens", "nothing"),
        ("--data.bad_row_rules.empty_anwser drop", "data.bad_row_rules.empty_anwser", "empty_answer"),
        ("--data.bad_row_rules.invalid_json fix", "data.bad_row_rules.invalid_json", "no fix"),
        ("--data.eval rows.jsonl --data.eval_fraction 0.1", "data.eval_fraction", "together"),
        ("--eval.every_steps 5", "eval.every_steps", "no data"),
        ("--data.chat_template no.jinja", "data.chat_template", "no file"),
        ("--data.train no.jsonl", "data.train", "no file"),
        ("--data.train no/*.jsonl", "data.train", "no file matches"),
        ("--data.train ./nothing", "data.train", "no file"),
        ("--data.train no.ndjson", "data.train", "no file"),
        ("--data.train no:such:thing", "data.train", "no file"),
        ("--data.eval [rows.jsonl,no.csv]", "data.eval[1]", "no file"),
        ("--model.path empty", "model.path", "config.json"),
        ("--model.path adapter", "model.path", "burnish merge"),
        ("--model.path rows.jsonl", "model.path", "is a file"),
        ("--model.path /no/such/model", "model.path", "no folder"),
        ("--model.trust_remote_code true", "model.trust_remote_code", "Pin"),
        ("--adapter.targets []", "adapter.targets", "empty"),
        ("--checkpoint.resume runs/b/checkpoints/step-1", "checkpoint.resume", "no folder"),
        ("--checkpoint.resume=", "checkpoint.resume", "no folder ''"),
        ("--output_dir .", "output_dir", "own"),
        ("--output_dir /", "output_dir", "own"),
        ("--output_dir rows.jsonl", "output_dir", "is a file"),
        ("--output_dir model --model.path model", "output_dir", "write over"),
    ],
)
def test_contradictions(flags, where, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, BASE + flags.split(" "))
    found = {p.where: p.what + p.cure for p in caught.value.problems}
    assert message in found[where], found
    assert all(p.cure for p in caught.value.problems)


@pytest.mark.parametrize(
    ("raw", "instead"),
    [
        ("gradient_accumulation_steps 4", "batch.global_examples"),
        ("train_batch_size 8", "batch.global_examples"),
        ("train_micro_batch_size_per_gpu 8", "batch.micro_tokens"),
        ("managed_gradient_accumulation true", "Leave it out"),
        ("optimizer.type Adam", "optim.name"),
        ("scheduler.type WarmupLR", "schedule.name"),
        ("gradient_clipping 0.5", "optim.max_grad_norm"),
        ("fp16.enabled true", "model.dtype"),
        ("bf16 {enabled: false}", "model.dtype"),
        ("zero_optimization.stage 1", "engine.zero_stage"),
        ("zero_optimization.offload_optimizer.device cpu", "engine.offload_optimizer"),
        ("zero_optimization.offload_param.nvme_path /mnt", "engine.nvme_path"),
        ("zero_optimization.zero_hpz_partition_size 8", "engine.hpz_size"),
        ("zero_optimization 3", "keys"),
        ("checkpoint.load_universal true", "checkpoint"),
        ("compile.deepcompile true", "Leave it out"),
    ],
)
def test_raw_deepspeed_settings_that_break_the_step(raw, instead):
    key, _, value = raw.partition(" ")
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*BASE, f"--engine.deepspeed.{key}", value])
    [problem] = caught.value.problems
    place = problem.where.removeprefix("engine.deepspeed.")
    assert key == place or key.startswith(f"{place}.")
    assert instead in problem.cure
    assert "not taken: " in problem.what or "section" in problem.what


def test_every_refused_setting_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*BASE, "--engine.deepspeed", "{fp16: {}, optimizer: {}, wandb: {}, amp: {}}"])
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"engine.deepspeed.{key}" for key in ("fp16", "optimizer", "amp")]


def test_other_raw_deepspeed_settings_are_taken():
    raw = "{comms_logger: {enabled: true}, zero_optimization: {reduce_bucket_size: 1e6}}"
    config = load_config(None, [*BASE, "--engine.deepspeed", raw])
    assert config.engine.deepspeed["zero_optimization"] == {"reduce_bucket_size": 1e6}


def test_a_misnamed_rule_is_reported_together_with_what_else_is_wrong():
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*BASE, "--data.bad_row_rules.xyz", "drop", "--optim.lr", "0"])
    found = {p.where: p.cure for p in caught.value.problems}
    assert found.keys() == {"optim.lr", "data.bad_row_rules.xyz"}
    assert "empty_answer" in found["data.bad_row_rules.xyz"]


def test_weights_need_the_weighted_mix():
    source = "[{path: rows.jsonl, weight: 2, name: a}, {path: rows.jsonl, name: a}]"
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*BASE, "--data.train", source])
    assert [p.where for p in caught.value.problems] == ["data.train[0].weight", "data.train[1].name"]


@pytest.mark.parametrize(
    "flags",
    [
        "--data.train org/dataset",
        "--data.train org/dataset:main",
        "--data.train dataset --model.path model",
        "--data.train *.jsonl --data.chat_template chat.jinja",
        "--data.chat_template chatml --checkpoint.resume must",
        "--adapter.quantize nf4 --engine.zero_stage 3 --engine.kind local",
        "--adapter.quantize nf4 --engine.zero_stage 2",
        "--engine.zero_stage 3 --engine.offload_params cpu",
        "--model.path model --model.init random --adapter.rank 4 --model.trust_remote_code",
        "--eval.every_steps 5 --data.eval_fraction 0.1",
        "--optim.name adafactor",
        "--optim.name adafactor --engine.kind deepspeed --engine.zero_stage 0",
        "--optim.name muon --engine.kind deepspeed --engine.zero_stage 3 --model.freeze [embed_tokens]",
        "--schedule.name wsd --schedule.decay_ratio 0.2 --train.router_aux_loss auto --train.z_loss 1e-4",
    ],
)
def test_what_is_right_passes(flags):
    load_config(None, BASE + flags.split(" "))


def test_a_file_of_the_model_that_may_not_be_read_is_said(monkeypatch):
    Path("model/model.safetensors").write_text("")
    may_read = lambda path, mode: Path(path).name != "model.safetensors"  # noqa: E731 - root may read all
    monkeypatch.setattr("burnish.durable.os.access", may_read)
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*BASE, "--model.path", "model"])
    [problem] = caught.value.problems
    assert str(problem).startswith("model.path: model/model.safetensors cannot be read: permission denied")


def test_a_folder_that_may_not_be_looked_into_is_one_problem_among_others(monkeypatch):
    def is_dir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", is_dir)
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*BASE, "--data.max_tokens", "1"])
    text = str(caught.value)
    assert text.count("some/model: may not be looked at: permission denied") == 1
    assert "data.max_tokens" in text


def test_home_is_known_in_data_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("train").mkdir()
    for path in ("~/rows.jsonl", "~/ro*.jsonl", "~/train"):
        load_config(None, [*BASE, "--data.train", path])
    for path in ("~/other.jsonl", "~/x*.jsonl", "~nobody-of-this-name/rows.jsonl"):
        with pytest.raises(ConfigError, match="no file"):
            load_config(None, [*BASE, "--data.train", path])


def test_a_run_where_its_checkpoint_is_meant_names_the_newest():
    for step in (4, 8):
        folder = Path(f"run/checkpoints/step-{step:08}")
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_text("{}")
    newest = Path("run/checkpoints/step-00000008")
    for place in ("run", "run/checkpoints"):
        with pytest.raises(ConfigError, match=f"checkpoint.resume: {newest}") as caught:
            load_config(None, [*BASE, "--checkpoint.resume", place])
        assert caught.value.problems[0].where == "checkpoint.resume"
    load_config(None, [*BASE, "--checkpoint.resume", str(newest)])
    Path("begun/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a run, and has no checkpoint"):
        load_config(None, [*BASE, "--checkpoint.resume", "begun"])
    Path("begun").rename("auto")
    load_config(None, [*BASE, "--checkpoint.resume", "auto"])  # the word, not a run of that name


ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/model",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["v_proj", "q_proj"],
    "use_dora": True,
    "rank_pattern": {},
    "modules_to_save": None,
    "megatron_core": "megatron.core",
    "inference_mode": True,
}


def write_adapter(name="first", weights="adapter_model.safetensors", **changes):
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **changes}))
    (folder / weights).write_bytes(b"")
    return ["--adapter.path", name]


def refused(*flags):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*BASE, *flags])
    return {problem.where: f"{problem.what} / {problem.cure}" for problem in caught.value.problems}


def test_what_is_not_set_is_the_adapters_own(tmp_path):
    begun = write_adapter()
    config = load_config(None, [*BASE, *begun])
    adapter = config.adapter
    assert adapter is not None and config.model.tokenizer is None
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.dropout) == ("dora", 4, 8, 0.1)
    assert adapter.targets == ("q_proj", "v_proj")
    again = tmp_path / "config.yaml"
    again.write_text(dump_config(config))
    assert load_config(again, []) == config
    same = ["--adapter.rank", "4", "--adapter.alpha", "8", "--adapter.targets", "[v_proj, q_proj]"]
    assert load_config(None, [*BASE, *begun, *same]) == config
    Path("first/tokenizer.json").write_text("{}")
    config = load_config(None, [*BASE, *begun, "--adapter.dropout", "0", "--adapter.quantize", "nf4"])
    assert config.adapter is not None and config.adapter.dropout == 0 and config.model.tokenizer == "first"
    assert load_config(None, [*BASE, *begun, "--model.tokenizer", "a/b"]).model.tokenizer == "a/b"


def test_what_decides_shapes_is_not_set_anew():
    other = ["--adapter.kind=lora", "--adapter.rank=8", "--adapter.alpha=1", "--adapter.targets=[o]"]
    found = refused(*write_adapter(), *other)
    assert set(found) == {"adapter.kind", "adapter.rank", "adapter.alpha", "adapter.targets"}
    assert "is 8, but the adapter in adapter.path has 4 / Leave it out" in found["adapter.rank"]
    assert "all-linear" in refused(*write_adapter(), "--adapter.targets", "all-linear")["adapter.targets"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias all"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "belongs to a changed base"),
        ({"use_rslora": True}, "use_dora and use_rslora"),
        ({"something_new": 3}, "something_new, which is not kept"),
        ({"r": "4"}, "which is no rank"),
        ({"lora_alpha": None}, "which is no scale"),
        ({"lora_dropout": 1}, "which is no share"),
        ({"target_modules": ".*q_proj"}, "no list of names"),
        ({"target_modules": None}, "no list of names"),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "not the same tokens"),
    ],
)
def test_adapters_that_would_lose_something_are_merged(changes, message):
    found = refused(*write_adapter(**changes))["adapter.path"]
    assert message in found and "burnish merge first OUT" in found


def test_what_is_no_adapter_is_said_with_what_to_give():
    assert "there is no folder nowhere" in refused("--adapter.path", "nowhere")["adapter.path"]
    assert "hf download some/one" in refused("--adapter.path", "some/one")["adapter.path"]
    assert "give it as model.path" in refused("--adapter.path", "model")["adapter.path"]
    Path("run").mkdir()
    write_adapter("run/final")
    assert "give its result: run/final" in refused("--adapter.path", "run")["adapter.path"]
    assert "as a pickle" in refused(*write_adapter("old", "adapter_model.bin"))["adapter.path"]
    broken = write_adapter("broken")
    Path("broken/adapter_config.json").write_text("{")
    assert "cannot be read" in refused(*broken)["adapter.path"]
    found = refused("--adapter.path", "run/final", "--output_dir", "run")
    assert "holds adapter.path" in found["output_dir"]
    found = refused(*write_adapter(), "--model.init", "random")
    assert "a base that it was not trained on" in found["adapter.path"]
    found = refused("--model.path", "first")["model.path"]
    assert "adapter.path: first and model.path: some/model" in found and "burnish merge first" in found


def test_an_adapters_base_is_compared_where_names_can_be(tmp_path):
    def doubt(*flags, **changes):
        return doubt_about_base(load_config(None, [*BASE, *write_adapter(**changes), *flags]))

    assert doubt() is None
    assert doubt(base_model_name_or_path="Some/Model") is None
    here = ["--model.path", "model"]
    assert doubt(*here, base_model_name_or_path=str(tmp_path / "model")) is None
    assert "make sure that model is the same" in (doubt(*here) or "")
    assert "/elsewhere/model" in (doubt(base_model_name_or_path="/elsewhere/model") or "")
    assert "does not say" in (doubt(base_model_name_or_path=None) or "")
    assert "revision abc" in (doubt(revision="abc") or "")
    found = refused(*write_adapter(base_model_name_or_path="other/model"))["adapter.path"]
    assert "Set model.path: other/model" in found
    Path("copy").mkdir()
    Path("copy/config.json").write_text("{}")
    found = refused(*write_adapter(base_model_name_or_path=str(tmp_path / "copy")), *here)["adapter.path"]
    assert "but model.path is model" in found
