"""Base and adapter to one full model, with the proof of how far the two differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish.config.adapter_file import CONFIG_FILE, recorded_base
from burnish.errors import ConfigError, Problem
from burnish.export.chat import save_tokenizer
from burnish.export.final import save_generation_config, save_model
from burnish.export.folder import whole_folder
from burnish.model.finished import load_finished, load_finished_tokenizer
from burnish.model.load import COMPUTE_DTYPES
from burnish.runtime import quieten_libraries

NUM_PROBE_ROWS, NUM_PROBE_TOKENS = 4, 64


@dataclass(frozen=True)
class MergeProof:
    """How far the merged model's next-token logits are from the adapter's, on probe tokens.

    The adapter's side runs in fp32, the merged one in the dtype it was saved in: the difference is
    what a user of the merged model gets.
    """

    num_tokens: int
    max_abs_logit: float
    """Largest absolute difference of any logit."""
    mean_kl: float
    """Mean KL divergence, adapter to merged, in nats."""
    max_kl: float
    same_top_token: float
    """Share of positions where both find the same next token likeliest."""


def merge(adapter: Path, out: Path, dtype: str = "bf16") -> MergeProof:
    """Merge an adapter into its base and save a full model, whole or not at all.

    The sum is made in fp32 and rounded once, to `dtype`.

    Args:
        adapter: A peft folder.
        out: Where the model goes.
        dtype: `bf16`, `fp16` or `fp32`.

    Raises:
        ConfigError: Not an adapter, or its base cannot be found.
        MachineError: It cannot be written, or is not what it should be.
    """
    quieten_libraries()
    _require_adapter(adapter)
    if dtype not in COMPUTE_DTYPES:
        raise ConfigError(Problem("--dtype", f"is {dtype!r}", f"Give one of {', '.join(COMPUTE_DTYPES)}."))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(Problem(str(out), "is there already", "Give a folder that does not exist yet."))
    try:
        adapted: Any = load_finished(str(adapter), torch.float32).eval()
        tokenizer: Any = load_finished_tokenizer(str(adapter))
    except (OSError, ValueError) as error:
        base = recorded_base(adapter)
        it = f"the adapter on its base {base}" if base else "the adapter"
        what = f"{it} cannot be loaded: {' '.join(str(error).split())}"
        cure = f"Put the base there, or correct base_model_name_or_path in {CONFIG_FILE}."
        raise ConfigError(Problem(str(adapter), what, cure)) from error
    generation = adapted.get_base_model().generation_config
    probe = _probe_tokens(len(tokenizer))
    wanted = _logits(adapted, probe)
    merged = _merged(adapted, adapter)
    with whole_folder(out) as staging:
        save_model(merged, merged.state_dict(), COMPUTE_DTYPES[dtype], staging)
        save_generation_config(generation, tokenizer, tokenizer.chat_template, staging)
        save_tokenizer(tokenizer, None, staging)
        card = f"# {out.name}\n\n{adapter.name} merged into its base with Burnish, in {dtype}.\n"
        (staging / "README.md").write_text(card, encoding="utf-8")
        del merged, adapted
        again: Any = load_finished(str(staging), COMPUTE_DTYPES[dtype])
        return _compare(wanted, _logits(again.eval(), probe))


def _merged(adapted: Any, adapter: Path) -> Any:
    try:
        return adapted.merge_and_unload(safe_merge=True)  # safe: refuses what is not finite
    except ValueError as error:
        cure = "Merge another result: best/, or one of an earlier checkpoint."
        raise ConfigError(Problem(str(adapter), f"cannot be merged: {error}", cure)) from error


def _require_adapter(adapter: Path) -> None:
    if not (adapter / CONFIG_FILE).is_file():
        cure = "Give the folder of an adapter, for example runs/first/final."
        raise ConfigError(Problem(str(adapter), f"is not an adapter (no {CONFIG_FILE})", cure))


def _probe_tokens(num_known: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, num_known, (NUM_PROBE_ROWS, NUM_PROBE_TOKENS), generator=generator)


@torch.no_grad()
def _logits(model: Any, probe: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(input_ids=row[None]).logits[0].float() for row in probe])


def _compare(wanted: torch.Tensor, found: torch.Tensor) -> MergeProof:
    first, second = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (first.exp() * (first - second)).sum(-1)
    return MergeProof(
        num_tokens=len(wanted),
        max_abs_logit=float((wanted - found).abs().max()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        same_top_token=float((wanted.argmax(-1) == found.argmax(-1)).double().mean()),
    )
