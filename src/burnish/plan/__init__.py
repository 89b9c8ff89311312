"""Pure arithmetic about a run before it runs: schedule, windows' counts, memory, time. No torch."""

from burnish.plan.counts import (
    DEFAULT_GLOBAL_EXAMPLES,
    DEFAULT_MICRO_TOKENS,
    CostModel,
    MicroBudget,
    WindowCounts,
)

__all__ = [
    "DEFAULT_GLOBAL_EXAMPLES",
    "DEFAULT_MICRO_TOKENS",
    "CostModel",
    "MicroBudget",
    "WindowCounts",
]
