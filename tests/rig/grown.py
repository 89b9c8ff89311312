"""Runs of loaded models as run.py makes them, with new tokens or a vision part; exported at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from burnish.config.adapter_file import token_rows_of, with_its_adapter
from burnish.config.schema import Config
from burnish.data.store import ExampleStore
from burnish.engine.build import model_init_context, parameter_dtype
from burnish.export import Exporter, ExportFacts, export_final
from burnish.model.attention import can_isolate
from burnish.model.build import build_model
from burnish.model.forward import SupervisedModel
from burnish.records import Example, Vocabulary
from burnish.runtime import Ranks, barrier
from burnish.train.loop import TrainJob, train
from burnish.train.step import Feed
from rig.runs import make_job, summary
from rig.toy import VOCABULARY, toy_config, toy_llama, toy_store

NEW_TOKENS = (VOCABULARY, VOCABULARY + 1)


def grown(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """A Llama that gets two tokens, which the data uses; with `resume_at` it goes on again from there."""
    base = toy_llama(tied=case.get("tied", False))
    vocabulary = Vocabulary(frozenset(NEW_TOKENS), frozenset(NEW_TOKENS), case.get("multiple"))
    return _run(case, ranks, output_dir, base, vocabulary)


def begun(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """A run that begins with the adapter of the run in `folder`; `start/` holds it as it is before a step."""
    other = Path(case["folder"])
    settings = {"model.path": str(other / "base"), "model.init": "pretrained", **case["settings"]}
    config, problems = with_its_adapter(
        toy_config(output_dir, {**settings, "adapter.path": str(other / "final")})
    )
    assert not problems, problems
    tokens = frozenset(token_rows_of(config.adapter))
    vocabulary = Vocabulary(tokens, tokens)
    job, exporter, model = _job(config, ranks, vocabulary)
    held = job.engine.export_state()
    if config.model.dtype == "bf16":  # ZeRO's forward has rounded weights, its masters have not
        from deepspeed.utils import safe_get_full_fp32_param

        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        held = {name: safe_get_full_fp32_param(p) for name, p in trained}
    if held is not None and ranks.is_main:
        tokenizer, facts = _tokenizer(vocabulary), ExportFacts(0, 0, 0)
        export_final(config, model, held, tokenizer, None, output_dir / "start", facts)
    state = train(job)
    exporter.export(output_dir / "final", state)
    return summary(job)


def sighted(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """A Qwen2-VL in bf16 files: its language model is trained."""
    return _run(case, ranks, output_dir, toy_qwen2_vl().to(torch.bfloat16), Vocabulary())


def toy_qwen2_vl() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(1)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.2, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def _run(
    case: Mapping[str, Any], ranks: Ranks, output_dir: Path, base: PreTrainedModel, vocabulary: Vocabulary
) -> dict[str, Any]:
    folder = output_dir / "base"
    if ranks.is_main:
        base.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"made": "up"}')
    barrier(ranks)
    settings = {**case["settings"], "model.path": str(folder), "model.init": "pretrained"}
    if "resume_at" in case:
        step = case["resume_at"]
        saving = toy_config(output_dir, {**settings, "checkpoint.every_steps": step})
        train(_job(saving, ranks, vocabulary)[0])
        settings["checkpoint.resume"] = str(output_dir / f"checkpoints/step-{step:08d}")
    job, exporter, _ = _job(toy_config(output_dir, settings), ranks, vocabulary)
    state = train(job)
    exporter.export(output_dir / "final", state)
    return summary(job)


def _job(config: Config, ranks: Ranks, vocabulary: Vocabulary) -> tuple[TrainJob, Exporter, Any]:
    dtype = parameter_dtype(config, ranks)
    context = partial(model_init_context, config, ranks, torch.device("cpu"), dtype)
    model = build_model(config, dtype, vocabulary, vocabulary.fresh(VOCABULARY), context)
    job = make_job(config, ranks, model=SupervisedModel(model, can_isolate(model)))
    if vocabulary.named:
        job = replace(job, feed=Feed(_with_new_tokens(), job.feed.packed, 0))
    return job, Exporter(config, job.engine, model, _tokenizer(vocabulary), None, ranks), model


def _with_new_tokens() -> ExampleStore:
    """The toy's examples with every fifth token a new one: same lengths and weights, so same windows."""
    toy = toy_store()
    examples = []
    for i in range(len(toy)):
        ids = toy[i].token_ids.copy()
        ids[1::5] = np.resize(NEW_TOKENS, len(ids[1::5]))
        examples.append(Example(toy[i].source, toy[i].row, ids, toy[i].weights))
    return ExampleStore.from_examples(examples)


def _tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY + len(vocabulary.named))}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", eos_token="w2")
