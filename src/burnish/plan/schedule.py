"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from burnish.config.schema import OptimConfig, ScheduleConfig


def num_warmup_steps(num_steps: int, schedule: ScheduleConfig) -> int:
    """Steps of the warm-up: `warmup_ratio` of the run, rounded up; 0 where the ratio is 0."""
    return _share(schedule.warmup_ratio, num_steps)


def _share(ratio: float, num_steps: int) -> int:
    # Rounded first, so that 0.07 of 100 steps is 7 and not the 8 that floating point makes of it.
    return math.ceil(round(ratio * num_steps, 6))


def learning_rate(step: int, num_steps: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """The learning rate of an optimizer step.

        peak            /-----\\___          step W is the first at the peak (step 1 without warm-up),
                      /            \\__      step num_steps is at min_lr_ratio * peak
        peak / W    /                  \\
                  1      W          num_steps

    Warm-up is linear, `step / W`, so that no step is wasted on a rate of 0. The decay is half a cosine
    (Loshchilov and Hutter, SGDR, 2016, without restarts), a line, or none. `wsd` (warm-up, stable, decay:
    Hu et al., MiniCPM, 2024) stays at the peak and falls in a line over the last D = `decay_ratio` of the
    steps, rounded up; the step before those is the last at the peak.

    Args:
        step: From 1 to `num_steps`.
        num_steps: Optimizer steps of the whole run.
        optim: Has the peak.
        schedule: Has the shape.

    Raises:
        ValueError: The step is outside the run.
    """
    if not 1 <= step <= num_steps:
        raise ValueError(f"step {step} is not between 1 and {num_steps}")
    warmup = num_warmup_steps(num_steps, schedule)
    if step < warmup:
        return optim.lr * step / warmup
    first = max(warmup, 1)
    if schedule.name == "constant" or num_steps == first:
        return float(optim.lr)
    if schedule.name == "wsd":
        first = max(first, num_steps - _share(schedule.decay_ratio, num_steps))
    progress = (step - first) / (num_steps - first) if step > first else 0.0
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return optim.lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * left)
