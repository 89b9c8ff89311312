"""Tokens that a run adds to its tokenizer, and whether the model has room for those it uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.config.schema import ModelConfig
from burnish.data.store import ExampleStore
from burnish.errors import ConfigError, Problem, first_few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_tokens(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> None:
    """Give a tokenizer the tokens of `model.add_tokens`, in their order, those it has already excepted.

    A special one is left out when text is decoded with `skip_special_tokens`, an ordinary one is not.
    """
    from tokenizers import AddedToken

    given = model.add_tokens
    kinds = given if isinstance(given, dict) else dict.fromkeys(given, "special")
    fast: Any = tokenizer
    has = fast.get_added_vocab()
    for name, kind in kinds.items():
        special = kind == "special"
        if name not in has:
            token = AddedToken(name, special=special, normalized=not special)
            fast.add_tokens([token], special_tokens=special)


def require_rows(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, stores: Iterable[ExampleStore | None]
) -> None:
    """Refuse data with tokens that the embedding has no row for.

    A tokenizer may have more tokens than the embedding has rows, as Gemma 3's text models do: it is only
    wrong to use them.

    Args:
        tokenizer: The run's.
        num_rows: Of the embedding, once it has grown by `model.add_tokens`.
        stores: All examples of the run.

    Raises:
        ConfigError: Such tokens are in the data; some are named.
    """
    numbers: list[int] = list(tokenizer.get_vocab().values())
    if max(numbers) < num_rows:
        return
    used: set[int] = set()
    for store in stores:
        for number in range(0 if store is None else len(store)):
            ids = store[number].token_ids  # pyright: ignore[reportOptionalSubscript]
            used |= {int(token) for token in np.unique(ids[ids >= num_rows])}
    if not used:
        return
    names: Any = tokenizer.convert_ids_to_tokens(sorted(used))
    shown = first_few(names)
    what = f"has {max(numbers) + 1} tokens, the model's embedding {num_rows} rows; the data uses {shown}"
    cure = (
        "Give the tokenizer that belongs to the model. Or, where these tokens are new to it, name them in "
        "model.add_tokens: then embedding and head grow."
    )
    raise ConfigError(Problem("model.tokenizer", what, cure))
