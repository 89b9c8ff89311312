"""What of TRL races: its defaults, and what a user may set. No torch, no trl: the parent reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRL_GRID: Mapping[str, Mapping[str, Any]] = {
    "trl": {},
    "trl-padded": {"gradient_checkpointing": False},
    "trl-packed": {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
    "trl-single": {"gradient_checkpointing": False, "per_device_train_batch_size": 1},
}
"""No recomputation; that and the documents end to end in one row; or that and one document at a time."""
