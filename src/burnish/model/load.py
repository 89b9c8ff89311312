"""A model from a Hugging Face folder or the hub, with its weights accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from burnish.config.check import unreadable_model
from burnish.config.packages import require_package
from burnish.config.schema import ModelConfig
from burnish.config.stored_weights import UNPACKED, cannot_train_stored, packing_of
from burnish.errors import ConfigError, MachineError, Problem, first_few
from burnish.hub import not_loaded, only_cached
from burnish.model.vision import architecture_of, freeze_vision, loader_of
from burnish.model.vocabulary import grow
from burnish.records import Vocabulary
from burnish.runtime import seeded

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Buffers that older checkpoints hold and today's code computes: no weights.
_COMPUTED_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.masked_bias|\.attn\.bias|attention\.bias)$")


def load_model(
    model: ModelConfig,
    *,
    seed: int,
    init_context: AbstractContextManager[Any] | None,
    param_dtype: torch.dtype,
    quantize: Literal["nf4"] | None = None,
    vocabulary: Vocabulary | None = None,
) -> PreTrainedModel:
    """Load a causal language model, or build it afresh, with rows for the tokens that were added.

    Args:
        model: Where from, and how.
        seed: Of fresh weights.
        init_context: The engine's context for loading (ZeRO-3), or None.
        param_dtype: What parameters are kept in.
        quantize: `nf4` keeps linear layers in 4 bits.
        vocabulary: What the tokenizer asks of the embedding; None for no more than there is.

    Raises:
        ConfigError: The model does not exist, is no causal language model, or is stored as nobody trains it.
        MachineError: Weights are missing, left over, or of another shape; a package is missing.
    """
    config = load_model_config(model)
    _settle_packing(config, model, quantize)
    vocabulary = vocabulary or Vocabulary()
    if model.init == "random":
        if quantize is not None:
            raise ConfigError(
                Problem(
                    "adapter.quantize",
                    f"{quantize} with model.init: random",
                    "Quantise a pretrained model, or leave adapter.quantize out.",
                )
            )
        text = config.get_text_config(decoder=True)
        text.vocab_size = vocabulary.num_rows(text.vocab_size)
        built = _fresh(config, seed, param_dtype, model)
    else:
        _check_weight_files(model.path)
        with init_context or nullcontext():
            built = _pretrained(model, config, param_dtype, quantize)
            if is_deepspeed_zero3_enabled():
                _forget_renamings(built)
            grow(built, vocabulary)
    freeze_vision(built)
    return built


def load_model_config(model: ModelConfig) -> Any:
    """config.json of a model, as transformers' own class.

    Raises:
        ConfigError: There is none, or its architecture is not known or not a causal decoder.
    """
    if _names_a_place(model.path) and not Path(model.path).expanduser().exists():
        raise ConfigError(Problem("model.path", f"there is no folder {model.path}", "Check the path."))
    path = _place(model.path)
    try:
        config = AutoConfig.from_pretrained(
            path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=only_cached(path),
        )
    except (OSError, ValueError, KeyError) as error:
        cure = (
            "Give a folder with config.json or a hub name; a new architecture may need a newer "
            "transformers, or model.trust_remote_code: true."
        )
        raise ConfigError(not_loaded("model.path", model.path, "model", error, cure)) from error
    if config.is_encoder_decoder:
        what = f"{model.path} is an encoder-decoder model ({config.model_type})"
        raise ConfigError(Problem("model.path", what, "Burnish trains causal language models."))
    remote = "AutoModelForCausalLM" in (config.to_dict().get("auto_map") or {})
    if architecture_of(config) is None and not remote:
        what = f"{model.path} ({config.model_type}) has no causal language model in transformers"
        raise ConfigError(Problem("model.path", what, "Burnish trains causal language models."))
    return config


def stored_dtype(model: ModelConfig, config: Any) -> torch.dtype | None:
    """What config.json says that weights are kept in; None for fresh ones, or where it says nothing.

    Args:
        model: Which.
        config: Its config.json, `load_model_config`.
    """
    if model.init == "random":
        return None
    return config.dtype or config.get_text_config(decoder=True).dtype


def _names_a_place(path: str) -> bool:
    """Whether it can only be meant as a path on this machine, not as a hub name."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def _place(path: str) -> str:
    place = Path(path).expanduser()
    return str(place) if place.exists() else path


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[:2])


def _fresh(config: Any, seed: int, dtype: torch.dtype, model: ModelConfig) -> PreTrainedModel:
    # Built whole on the CPU and in fp32, outside any ZeRO-3 context (which would skip or split the
    # initialisation): so the weights are the same under every engine, dtype and world size. The
    # engine partitions them afterwards.
    with seeded(seed):
        architecture: Any = architecture_of(config)
        if architecture is not None:
            # The class itself: `from_config` would partition while a ZeRO-3 config is alive.
            built = architecture(config)
        else:
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    for parameter in built.parameters():  # parameters only: rotary frequencies stay in fp32
        parameter.data = parameter.data.to(dtype)
    config.dtype = dtype
    return built


def _check_weight_files(path: str) -> None:
    """Weights are read from safetensors only: a pickle can run any code."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return
    unreadable = unreadable_model(folder)
    if unreadable:
        raise ConfigError(*unreadable)
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    if pickles:
        raise ConfigError(
            Problem(
                "model.path",
                f"{path} has its weights only as pickle files ({first_few(pickles)})",
                "Convert them where you trust them: load with transformers, then save_pretrained.",
            )
        )
    raise ConfigError(
        Problem(
            "model.path",
            f"{path} has no weights (*.safetensors)",
            "Set model.init: random to start from fresh weights, or give a folder with weights.",
        )
    )


def _settle_packing(config: Any, model: ModelConfig, quantize: Literal["nf4"] | None) -> None:
    """Have weights that are stored in fewer bits turned back; fresh ones have no such form to tell of."""
    values = config.to_dict()
    problem = cannot_train_stored(values, model.init, quantize)
    if problem is not None:
        raise ConfigError(problem)
    packing = packing_of(values)
    holder = config if values.get("quantization_config") else config.get_text_config(decoder=True)
    if packing is not None and model.init == "random":
        del holder.quantization_config
    elif packing is not None and packing.get("quant_method") in UNPACKED:
        # transformers does so by itself only where the kernels for them are not there.
        holder.quantization_config = {**packing, "dequantize": True}


def _pretrained(
    model: ModelConfig, config: Any, dtype: torch.dtype, quantize: Literal["nf4"] | None
) -> PreTrainedModel:
    arguments: dict[str, Any] = {}
    if quantize == "nf4":
        arguments["quantization_config"] = _nf4(COMPUTE_DTYPES[model.dtype])
    try:
        with reading_weights(model.path):
            loaded: Any = loader_of(config).from_pretrained(
                _place(model.path),
                config=config,
                revision=model.revision,
                dtype=dtype,
                trust_remote_code=model.trust_remote_code,
                local_files_only=only_cached(model.path),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that they come back by name instead of as a traceback
                output_loading_info=True,
                **arguments,
            )
    except OSError as error:
        raise ConfigError(not_loaded("model.path", model.path, "model", error, "Check the path.")) from error
    except RuntimeError as error:
        # Under ZeRO-3 a shape that does not fit is raised in spite of the request above.
        if "size mismatch" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise MachineError(*_name_them(model.path, "weights could not be read", lines)) from error
    except (ValueError, IndexError) as error:
        # Marian's, RoFormer's, RWKV's and others' code fills tables or scales weights by their shapes.
        if not is_deepspeed_zero3_enabled():
            raise
        what = (
            f"transformers cannot load {config.model_type} in parts: its code looks into weights that ZeRO 3 "
            f"has shared out ({type(error).__name__}: {_first_lines(error)})"
        )
        raise ConfigError(Problem("engine.zero_stage", what, "Set engine.zero_stage: 2.")) from error
    built, report = loaded
    check_report(model.path, report)
    if quantize is not None:
        _keep_differentiable(built)
    return built


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit layers in the form that has gradients.

    Works around bitsandbytes 0.50 (`nn/modules.py`, `Linear4bit.forward`), which on a CPU with AVX512-BF16
    lays weights out anew in the first evaluation and never back: what is trained after that gets no gradient
    through them, silently, and widths that do not fit end in a RuntimeError. To be removed once it goes back.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _forget_renamings(model: Any) -> None:
    """Let a model that was loaded under ZeRO-3 be saved under its class's own names.

    Works around transformers 5.23 (`integrations/deepspeed.py`, `_load_state_dict_into_zero3_model`), which
    notes every renaming that a class knows as used in loading, and applies them all backwards in saving: a
    vision-language model comes out as `model.model.layers`, which loads nowhere. `core_model_loading.py`
    notes those that were used; to be removed once the other does.
    """
    model._weight_conversions = None


def _nf4(compute_dtype: torch.dtype) -> Any:
    require_package("nf4")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


@contextmanager
def reading_weights(path: str) -> Iterator[None]:
    """What safetensors cannot read in the block is a damaged file: it is named, with what to do.

    Args:
        path: The folder that is read in the block, or a hub name.

    Raises:
        MachineError: A file cannot be read.
    """
    try:
        yield
    except SafetensorError as error:  # no OSError, not even for a file that was cut off
        file = next((f for f in sorted(Path(path).glob("*.safetensors")) if not _can_be_opened(f)), path)
        cure = "It may be an incomplete download: download or copy it again."
        raise MachineError(Problem("model.path", f"{file} cannot be read: {error}", cure)) from error


def _can_be_opened(file: Path) -> bool:
    try:
        safe_open(file, framework="pt")
    except (OSError, SafetensorError):
        return False
    return True


def check_report(path: str, report: dict[str, Any]) -> None:
    """Every weight has to come from the checkpoint, and every weight of the checkpoint to be used.

    Args:
        path: The model's folder or hub name.
        report: What transformers says of its loading (`output_loading_info`).

    Raises:
        MachineError: Weights are missing, left over, of another shape, or could not be read.
    """
    leftovers = [k for k in report["unexpected_keys"] if not _COMPUTED_BUFFERS.search(k)]
    problems = [
        *_name_them(path, "weights are missing and would be random", report["missing_keys"]),
        *_name_them(path, "weights have another shape than config.json says", report["mismatched_keys"]),
        *_name_them(path, "weights belong to no part of the model", leftovers),
        *_name_them(path, "weights could not be read", report.get("error_msgs") or []),
    ]
    if problems:
        raise MachineError(*problems)


def _name_them(path: str, what: str, entries: Any) -> list[Problem]:
    # A mismatch is (name, shape in the file, shape in the model).
    names = sorted(" ".join(map(str, e)) if isinstance(e, tuple) else str(e) for e in entries)
    if not names:
        return []
    cure = "The folder may be an incomplete download, or config.json of another model."
    return [Problem("model.path", f"{path}: {len(names)} {what}: {first_few(names)}", cure)]
