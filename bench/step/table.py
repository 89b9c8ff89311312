"""Results as people read them: a table per case, and the block in docs/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
_BLOCK = re.compile(r"(<!-- made by bench/step\.py -->\n).*?(<!-- end of bench/step\.py -->\n)", re.DOTALL)

NAMES = {
    "burnish": "Burnish",
    "burnish-compiled": "Burnish, model.compile",
    "hf-packed": "Hugging Face, packed, 4D mask, all logits",
    "hf-packed-as-is": "Hugging Face, packed, without the allocator setting",
    "hf-packed-compiled": "Hugging Face, packed, compiled",
    "hf-padded": "Hugging Face, padded, all logits",
    "openrlhf": "OpenRLHF's forward and loss (emulated), padded",
    "trl": "TRL, defaults",
    "trl-padded": "TRL, padded, no recomputation",
    "trl-packed": "TRL, documents in one row, no recomputation",
    "trl-single": "TRL, a document at a time, no recomputation",
}
HEADS = (
    "", "time (ours = 1)", "s a step", "supervised tokens/s", "all tokens/s", "MFU", "memory over the model",
)  # fmt: skip
_LEAST: Mapping[str, tuple[float, ...]] = {
    "llama/alpaca": (6.0, 3.5, 2.8, 1.7, 1.7),
    "llama/long-prompts": (9.0, 5.0, 4.5, 3.0, 3.0),
}
GATES = {
    case: dict(zip(("trl", "trl best", "openrlhf", "hf-packed-as-is", "hf-packed"), least, strict=True))
    for case, least in _LEAST.items()
}
"""Least time ratios, by case."""
MEMORY_GATE = 0.65
"""Most memory over the model, as a share of Hugging Face packed."""


def table(found: Mapping[str, Any]) -> str:
    """One case in Markdown."""
    rows = [HEADS, ("---",) * len(HEADS)]
    racers = found["racers"]
    own = racers["burnish"]["peak_over_model_bytes"]
    for name, numbers in sorted(racers.items(), key=lambda item: item[1]["ratio"]["median"]):
        ratio, peak = numbers["ratio"], numbers["peak_over_model_bytes"]
        spread = "" if numbers["rounds"] < 2 else f" ({ratio['min']:.2f} to {ratio['max']:.2f})"
        mfu = "" if numbers["mfu"] is None else f"{numbers['mfu']:.0%}"
        rows.append(
            (
                NAMES[name],
                "1" if name == "burnish" else f"{ratio['median']:.2f}{spread}",
                f"{numbers['seconds']['median']:.2f}",
                _count(numbers["supervised_tokens_per_second"]),
                _count(numbers["tokens_per_second"]),
                mfu,
                f"{peak / 2**20:,.0f} MiB" + ("" if name == "burnish" else f" ({peak / own:.2f})"),
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _count(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"


def verdicts(found: Mapping[str, Any], curve: Mapping[str, Any] | None) -> dict[str, bool]:
    """Each target of a case, and whether it was met."""
    racers, met = found["racers"], {"parity": bool(found["gates"]["passed"])}
    if curve is not None:
        met["loss curve"] = bool(curve["passed"])
    ratios = {name: numbers["ratio"]["median"] for name, numbers in racers.items()}
    tuned = [name for name in racers if name.startswith("trl-")]
    if tuned:  # that which was the fastest in the first round is the one that went on
        best = max(tuned, key=lambda name: (racers[name]["rounds"], -racers[name]["seconds"]["median"]))
        ratios["trl best"] = ratios[best]
    # What `model.compile: auto` does in a long run: on CPUs only.
    judges = found.get("device", "cpu") == "cpu" and "burnish-compiled" in ratios
    compiled = ratios["burnish-compiled"] if judges else 1.0
    for name, least in GATES.get(found["case"], {}).items():
        if name in ratios:
            long_run = ratios[name] / compiled
            also = f", {long_run:.2f} over compiled layers" if judges else ""
            met[f"{least} over {name} (is {ratios[name]:.2f}{also})"] = long_run >= least
    if found["case"] in GATES and "hf-packed" in racers:
        share = racers["burnish"]["peak_over_model_bytes"] / racers["hf-packed"]["peak_over_model_bytes"]
        met[f"memory at most {MEMORY_GATE} of hf-packed (is {share:.2f})"] = share <= MEMORY_GATE
    return met


def curve_sentence(curve: Mapping[str, Any]) -> str:
    """How far the loss curves are apart, in words."""
    verdict = "within" if curve["passed"] else "NOT within"
    losses, plain, direct = curve["losses"]["own"], curve["plain_bf16"], curve["own_to_plain_bf16"]
    return (
        f"Loss over {curve['steps']} steps in bf16, from {losses[0]:.2f} to {losses[-1]:.2f}: {verdict} "
        f"{curve['limit']:.1%} of plain fp32 ({_apart(curve)}). Plain transformers in bf16 against plain "
        f"fp32: {_apart(plain)}; from that curve ours differs by {direct['largest_gap']:.3%} at most."
    )


def _apart(gaps: Mapping[str, Any]) -> str:
    largest, step = gaps["largest_gap"], gaps["largest_gap_at_step"]
    return f"{largest:.2%} at step {step}, {gaps['last_gap']:.2%} in the mean of the last ones"


def heading(found: Mapping[str, Any], curve: Mapping[str, Any] | None) -> str:
    """What the case was, and whether the gates held."""
    rate, gates = found["matrix_flops_per_second"], found["gates"]
    parity = "; ".join(
        f"{dtype}: loss {gates[dtype]['loss']:.1e}, worst gradient {gates[dtype]['gradient']:.1e}"
        for dtype in ("fp32", "bf16")
        if dtype in gates
    )
    return (
        f"**{found['case']}**: {found['tokens_per_step']:,.0f} tokens a step, "
        f"{found['supervised_share']:.2f} of them supervised, {found['mean_document_tokens']:.0f} a "
        f"document; {found['parameters'] / 1e6:.0f} million parameters; bf16 matrix products run at "
        f"{rate['median'] / 1e9:,.0f} GFLOP/s; {found['rounds']} rounds. "
        f"Against each document alone in fp32: {parity}."
        + ("\n" if curve is None else f" {curve_sentence(curve)}\n")
    )


def block(results: Mapping[str, Any]) -> str:
    """All cases, for the page."""
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    first = (
        f"{machine['date']}, {machine['cores']} cores ({machine['architecture']}), {packages}; "
        f"rows: {results['data']}.\n"
    )
    curves = results.get("curves", {})
    parts = [
        f"{heading(found, curves.get(case))}\n{table(found)}" for case, found in results["cases"].items()
    ]
    return "\n".join([first, *parts])


def write_page(results: Mapping[str, Any]) -> None:
    """Put the tables into docs/benchmarks.md."""
    page = PAGE.read_text("utf-8")
    filled = _BLOCK.sub(lambda found: found[1] + block(results) + found[2], page)
    PAGE.write_text(filled, "utf-8")


def printed(found: Mapping[str, Any], curve: Mapping[str, Any] | None) -> str:
    """One case on a terminal."""
    targets = verdicts(found, curve)
    lines = [f"{'met ' if met else 'MISS'} {what}" for what, met in targets.items()]
    lines += [f"{name} dropped out: {why.strip().splitlines()[-1]}" for name, why in found["lost"].items()]
    return f"{heading(found, curve)}\n{table(found)}\n" + "\n".join(lines) + "\n"
