"""What keys alone say of how documents lie in a forward: whether they are packed, and share beginnings."""

from __future__ import annotations

from collections.abc import Iterator

from burnish.config.schema import Config
from burnish.errors import Problem

OWN_ATTENTION = ("auto", "varlen")
"""Choices of `model.attention` that mean our attention function."""
CURE_SHARING = "Set it to auto: what can be shared then is, and the plan says what is not."


def refused_layout(config: Config) -> Iterator[Problem]:
    """Packing or sharing that is asked for by name, and that another key rules out."""
    attention = config.model.attention
    if config.data.packing == "on" and attention not in OWN_ATTENTION:
        what = f"is on, but packing is not offered with attention: {attention}"
        yield Problem("data.packing", what, "Set it to auto: rows are then padded.")
    problem = next(sharing_conflicts(config), None)
    if config.data.share_prefix == "on" and problem is not None:
        yield Problem("data.share_prefix", f"is on, but {problem}", CURE_SHARING)


def sharing_conflicts(config: Config) -> Iterator[str]:
    """Why examples may not share the computation of what they begin with."""
    data, train = config.data, config.train
    if data.packing == "off" or config.model.attention not in OWN_ATTENTION:
        yield "it needs data.packing and our attention (model.attention: auto)"
    if config.batch.micro_examples is not None:
        yield "batch.micro_examples cuts forwards by examples"
    if config.engine.sequence_parallel > 1:
        yield "engine.sequence_parallel gives each rank a part of every row"
    if train.neftune_alpha is not None:
        yield "train.neftune_alpha puts another noise on each example"
    if train.router_aux_loss != 0:
        yield "train.router_aux_loss looks at each example by itself"
    if config.adapter is not None and config.adapter.dropout > 0:
        yield "adapter.dropout draws for each example anew"
