"""A plan as plain text for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from burnish.errors import counted

if TYPE_CHECKING:
    from burnish.plan.build import Plan


def describe_plan(plan: Plan) -> str:
    """One line for each thing, the label in a column of its own."""
    rows = [*_data_rows(plan), *_step_rows(plan), *_machine_rows(plan)]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def _data_rows(plan: Plan) -> list[tuple[str, str]]:
    counts = plan.counts
    share = counts.num_supervised_tokens / max(1, counts.num_tokens)
    rows = [
        (
            "data",
            f"{counts.num_examples:,} examples, {counts.num_tokens:,} tokens, "
            f"{counts.num_supervised_tokens:,} of them trained on ({share:.0%})",
        )
    ]
    if len(counts.examples_per_source) > 1:
        parts = [f"{name} {num:,}" for name, num in counts.examples_per_source.items()]
        rows.append(("sources", ", ".join(parts)))
    if counts.num_computed_tokens is not None:
        saved = 1 - counts.num_computed_tokens / counts.num_tokens
        text = f"{counts.num_computed_tokens:,} tokens computed, {saved:.0%} saved: examples begin alike"
        rows.append(("shared", f"{text} ({counts.num_computed_windows:,} windows looked at)"))
    elif counts.unshared is not None:
        rows.append(("shared", f"no beginnings of examples: {counts.unshared}"))
    return rows


def _step_rows(plan: Plan) -> list[tuple[str, str]]:
    counts = plan.counts
    warmup = f"{plan.num_warmup_steps:,} warm-up"
    steps = f"{counts.num_steps:,} ({counts.steps_per_epoch:,} an epoch), {warmup}"
    low, high = counts.micro_batches_min, counts.micro_batches_max
    each = f"{low}" if low == high else f"{low} to {high}"
    layout = "packed" if counts.packed else "padded"
    micro = f"{each} a step and rank, {layout}, at most {counts.max_micro_tokens:,} tokens each"
    balance = (
        f"slowest of {counts.world_size} ranks {counts.imbalance_mean:.2%} over the mean, "
        f"{counts.imbalance_max:.2%} at worst ({counts.imbalance_windows:,} windows)"
    )
    rows = [("steps", steps), ("micro-batches", micro)]
    if counts.num_counted_steps is not None:
        text = (
            f"the first {counts.num_counted_steps:,} steps; tokens and micro-batches of the rest like theirs"
        )
        rows.append(("counted", text))
    return [*rows, ("balance", balance)] if counts.world_size > 1 else rows


def _machine_rows(plan: Plan) -> list[tuple[str, str]]:
    about = "" if plan.exact_params else "about "
    parts = plan.memory.device
    named = [(name, num) for name, num in parts.to_dict().items() if name != "total" and num]
    memory = f"about {bytes_text(parts.total)} a rank: " + ", ".join(f"{n} {bytes_text(b)}" for n, b in named)
    rows = [
        ("parameters", f"{about}{plan.num_params:,}, {plan.num_trainable_params:,} trained"),
        ("memory", memory),
    ]
    for place, num in (("host memory", plan.memory.host_bytes), ("nvme", plan.memory.nvme_bytes)):
        if num:
            rows.append((place, f"{bytes_text(num)} a rank"))
    rows += [("chosen" if number == 0 else "", text) for number, text in enumerate(plan.choices)]
    if plan.device is not None:
        verdict = "fits" if plan.fits else "does not fit"
        rows.append(("device", f"{plan.device.name}, {bytes_text(plan.device.memory_bytes)}: {verdict}"))
    if plan.seconds is not None and plan.device is not None:
        rows.append(("time", f"about {seconds_text(plan.seconds)} at {plan.device.mfu:.0%} of peak"))
    saves = f"{counted(len(plan.checkpoint_steps), 'checkpoint')} of {bytes_text(plan.checkpoint_bytes)}"
    rows.append(("disk", f"up to {bytes_text(plan.disk_bytes)}, {saves}"))
    if plan.fits is False and plan.suggestions:
        rows.append(("to fit", plan.suggestions[0]))
        rows += [("", line) for line in plan.suggestions[1:]]
    elif plan.fits is False:
        rows.append(("to fit", "no setting is enough: more or larger GPUs, or a smaller model"))
    return rows


def bytes_text(num: int | float) -> str:
    """A size with three digits: `1.23 GB` (decimal units, as device memory is sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num < 1000:
            return f"{num:.3g} {unit}"
        num /= 1000
    return f"{num:.3g} TB"


def seconds_text(seconds: int | float) -> str:
    """A duration in the two units that matter: `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
