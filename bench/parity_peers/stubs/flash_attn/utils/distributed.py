"""`all_gather` of one process. OpenRLHF calls it for ring attention only, which is not compared."""

from __future__ import annotations

from typing import Any

import torch


def all_gather(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Refuse: a comparison on one process has nothing to gather."""
    raise NotImplementedError("ring attention is no part of the comparison")
