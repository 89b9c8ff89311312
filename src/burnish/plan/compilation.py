"""Whether layers are compiled where the config leaves that to the plan. Pure arithmetic."""

from __future__ import annotations

from burnish.config.check import compile_conflicts
from burnish.config.schema import Config
from burnish.plan.counts import WindowCounts
from burnish.plan.effort import train_flops
from burnish.plan.shapes import ModelShape

PAYS_FROM_FLOPS = 2e14
"""Of a run: ten minutes or so of two cores. Compiling takes a minute of them, once for a machine and a kind
of model, and saves a sixth to a third of each step."""


def resolve_compile(
    config: Config, counts: WindowCounts, shape: ModelShape, device_type: str, able: bool
) -> Config:
    """The config with `model.compile: auto` made true or false; a pure function of its arguments.

    The whole run counts, whatever of it is done already and however many ranks there are, so that a run that
    is resumed computes as it did.

    Args:
        config: Resolved otherwise.
        counts: What the windows hold.
        shape: The model.
        device_type: `cuda` or `cpu`. On CUDA nobody has measured it: there it is left out.
        able: Whether there is a compiler, and layers to compile.
    """
    if config.model.compile != "auto":
        return config
    # Rows that share beginnings are another kind of row: layers would be compiled twice.
    plain = counts.packed and counts.num_computed_tokens is None
    suits = device_type == "cpu" and config.model.dtype == "bf16" and plain and able
    pays = suits and train_flops(config, counts, shape) >= PAYS_FROM_FLOPS
    wanted = pays and next(compile_conflicts(config), None) is None
    model = config.model.model_copy(update={"compile": wanted})
    return config.model_copy(update={"model": model})
