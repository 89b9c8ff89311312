"""A model from a Hugging Face folder or the hub, with its weights accounted for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from burnish.config.schema import ModelConfig
from burnish.errors import ConfigError, MachineError, Problem


def load_model(
    model: ModelConfig,
    *,
    seed: int,
    init_context: AbstractContextManager[Any] | None,
    param_dtype: torch.dtype,
    quantize: Literal["nf4"] | None = None,
    tokenizer_size: int,
) -> PreTrainedModel:
    """Load a causal language model, or build it afresh.

    Args:
        model: Where from, and how.
        seed: Of fresh weights.
        init_context: The engine's context for making modules (ZeRO-3), or None.
        param_dtype: What parameters are kept in.
        quantize: `nf4` keeps linear layers in 4 bits.
        tokenizer_size: Tokens that the tokenizer can produce; the embedding must hold them.

    Raises:
        ConfigError: The model does not exist, or is not a causal language model.
        MachineError: Weights are missing, left over, or of another shape; a package is missing.
    """
    config = load_model_config(model)
    if model.init == "random":
        built = _fresh(config, seed, param_dtype, model)
    else:
        with init_context or nullcontext():
            built = _pretrained(model, config, param_dtype, quantize)
    _check_vocabulary(built, tokenizer_size)
    return built


def load_model_config(model: ModelConfig) -> Any:
    """config.json of a model, as transformers' own class.

    Raises:
        ConfigError: There is none, or its architecture is not known or not a causal decoder.
    """
    try:
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            Problem("model.path", f"{model.path} cannot be loaded: {error}", "Give a folder or a hub name.")
        ) from error
    if config.is_encoder_decoder:
        raise ConfigError(
            Problem(
                "model.path",
                f"{model.path} is an encoder-decoder model ({config.model_type})",
                "Burnish trains causal language models.",
            )
        )
    return config


def _fresh(config: Any, seed: int, dtype: torch.dtype, model: ModelConfig) -> PreTrainedModel:
    # Built whole on the CPU, outside any ZeRO-3 context (which would skip the initialisation): so the
    # weights are the same under every engine and world size. The engine partitions it afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=model.trust_remote_code
        )
    return built.to(dtype)


def _pretrained(
    model: ModelConfig, config: Any, dtype: torch.dtype, quantize: Literal["nf4"] | None
) -> PreTrainedModel:
    arguments: dict[str, Any] = {}
    if quantize == "nf4":
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model.path,
        config=config,
        revision=model.revision,
        dtype=dtype,
        trust_remote_code=model.trust_remote_code,
        output_loading_info=True,
        **arguments,
    )
    built, report = loaded
    problems = [
        Problem("model.path", f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(names, key=str)))}")
        for kind, names in report.items()
        if kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs") and names
    ]
    if problems:
        raise MachineError(*problems)
    return built


def _check_vocabulary(model: PreTrainedModel, tokenizer_size: int) -> None:
    rows = model.config.get_text_config(decoder=True).vocab_size
    if tokenizer_size > rows:
        raise ConfigError(
            Problem(
                "model.tokenizer",
                f"the tokenizer has {tokenizer_size} tokens, the model's embedding {rows} rows",
                "Give the tokenizer that belongs to the model.",
            )
        )
