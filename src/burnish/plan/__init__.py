"""Pure arithmetic about a run before it runs: schedule, windows' counts, memory, time. No torch."""

from burnish.plan.auto import explain_auto, fit_micro_tokens, resolve_auto
from burnish.plan.build import Plan, make_plan
from burnish.plan.compilation import resolve_compile
from burnish.plan.counts import (
    DEFAULT_GLOBAL_EXAMPLES,
    DEFAULT_MICRO_TOKENS,
    CostModel,
    MicroBudget,
    WindowCounts,
)
from burnish.plan.describe import bytes_text, seconds_text
from burnish.plan.effort import DEVICES, Device, find_device, train_flops
from burnish.plan.memory import Memory, MemoryParts, estimate_memory
from burnish.plan.optimizer_state import trainable_params
from burnish.plan.packing import surely_apart, surely_packed
from burnish.plan.schedule import learning_rate, num_warmup_steps
from burnish.plan.shapes import FAMILIES, ModelShape
from burnish.plan.sharing import unshared, unsuited
from burnish.plan.suggest import suggest

__all__ = [
    "DEFAULT_GLOBAL_EXAMPLES",
    "DEFAULT_MICRO_TOKENS",
    "DEVICES",
    "FAMILIES",
    "CostModel",
    "Device",
    "Memory",
    "MemoryParts",
    "MicroBudget",
    "ModelShape",
    "Plan",
    "WindowCounts",
    "bytes_text",
    "estimate_memory",
    "explain_auto",
    "find_device",
    "fit_micro_tokens",
    "learning_rate",
    "make_plan",
    "num_warmup_steps",
    "resolve_auto",
    "resolve_compile",
    "seconds_text",
    "suggest",
    "surely_apart",
    "surely_packed",
    "train_flops",
    "trainable_params",
    "unshared",
    "unsuited",
]
