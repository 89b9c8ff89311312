"""What became of the data: a dictionary for `data_report.json`, and its text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from burnish.config.row_rules import RULES
from burnish.config.schema import DataConfig
from burnish.data.policies import counts_as_bad
from burnish.data.store import ExampleStore, Part
from burnish.errors import Problem, counted

REPORT_VERSION = 1
NUM_PLACES = 5
"""Pairs of equal rows that are named."""


def bad_fraction_problem(summaries: Sequence[Mapping[str, Any]], data: DataConfig) -> Problem | None:
    """The problem that too large a share of all rows was left out, if it was."""
    num_rows = sum(summary["rows"] for summary in summaries)
    bad: dict[str, int] = {}
    for summary in summaries:
        for rule, entry in summary["dropped"].items():
            if counts_as_bad(rule, data):
                bad[rule] = bad.get(rule, 0) + entry["rows"]
    num_bad = sum(bad.values())
    if not num_rows or num_bad <= data.max_bad_fraction * num_rows:
        return None
    lines = [f"{rule} ({counted(count, 'row')}): {RULES[rule].cure}" for rule, count in bad.items()]
    for summary in summaries:
        for rule, entry in summary["dropped"].items():
            places = [f"{place['place']}: {place['what']} [{rule}]" for place in entry["places"]]
            lines += places if counts_as_bad(rule, data) else []
    what = (
        f"{num_bad} of {num_rows} rows ({num_bad / num_rows:.2%}) cannot be trained on, "
        f"more than {data.max_bad_fraction:.2%}"
    )
    cure = "\n    ".join(["Mend them, or raise data.max_bad_fraction.", *lines])
    return Problem("data.max_bad_fraction", what, cure)


def build_report(
    data: DataConfig,
    sources: Sequence[Mapping[str, Any]],
    parts: Sequence[Part],
    train: ExampleStore,
    evaluation: ExampleStore | None,
) -> dict[str, Any]:
    """The report of a run's data, plain JSON.

    Args:
        data: The config's data section.
        sources: Of each source, its name, files and counts of rows.
        parts: Of each source, its examples.
        train: What is trained on.
        evaluation: What is evaluated on, if anything.
    """
    described = [{**source, **_example_counts(part)} for source, part in zip(sources, parts, strict=True)]
    keys = ("rows", "rows_kept", "examples", "tokens", "supervised_tokens", "truncated_examples")
    totals = {key: sum(source[key] for source in described) for key in (*keys, *_CUT)}
    totals["rows_dropped"] = totals["rows"] - totals["rows_kept"]
    lost = [entry for source in described for entry in source["dropped"].values()]
    totals["tokens_dropped"] = sum(entry["tokens"] for entry in lost)
    totals["supervised_tokens_dropped"] = sum(entry["supervised_tokens"] for entry in lost)
    for key in ("tokens", "supervised_tokens"):
        totals[f"{key}_lost"] = totals[f"{key}_dropped"] + totals[f"{key}_cut"]
    totals["rows_fixed"] = sum(e["rows"] for source in described for e in source["fixed"].values())
    return {
        "version": REPORT_VERSION,
        "max_tokens": data.max_tokens,
        "totals": totals,
        "train": _store_counts(train),
        "eval": None if evaluation is None else _store_counts(evaluation),
        "duplicate_rows": _duplicates(train),
        "eval_rows_in_training": {"rows": 0, "places": []}
        if evaluation is None
        else _shared_rows(evaluation, train),
        "sources": described,
    }


_CUT = ("tokens_cut", "supervised_tokens_cut")


def _example_counts(part: Part) -> dict[str, Any]:
    lengths, supervised, cut = part.column("length"), part.column("supervised"), part.column("tokens_cut")
    return {
        "examples": len(part),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(supervised.sum()),
        "truncated_examples": int((cut > 0).sum()),
        "truncated_answers": int((part.column("supervised_cut") > 0).sum()),
        "tokens_cut": int(cut.sum()),
        "supervised_tokens_cut": int(part.column("supervised_cut").sum()),
        "longest_tokens": int(lengths.max(initial=0)),
        "mean_tokens": float(lengths.mean()) if len(part) else 0.0,
        "length_histogram": _histogram(lengths, supervised),
    }


def _histogram(lengths: Any, supervised: Any) -> list[dict[str, int]]:
    """Examples, tokens and supervised tokens by length, in bins that end at powers of two."""
    if not len(lengths):
        return []
    bins = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    rows = []
    for exponent in range(int(bins.min()), int(bins.max()) + 1):
        own = bins == exponent
        rows.append(
            {
                "up_to_tokens": 2**exponent,
                "examples": int(own.sum()),
                "tokens": int(lengths[own].sum()),
                "supervised_tokens": int(supervised[own].sum()),
            }
        )
    return rows


def _store_counts(store: ExampleStore) -> dict[str, Any]:
    return {
        "examples": len(store),
        "tokens": int(store.num_tokens.sum()),
        "supervised_tokens": int(store.num_supervised.sum()),
        "longest_tokens": int(store.num_tokens.max(initial=0)),
        "sources": {
            name: int((store.source_ids == which).sum()) for which, name in enumerate(store.source_names)
        },
    }


def _duplicates(store: ExampleStore) -> dict[str, Any]:
    """Rows that equal an earlier one, over all sources; what is equal is the normalised content."""
    rows = np.flatnonzero(store.pieces == 0)
    _, first, members = np.unique(store.row_hashes[rows], return_index=True, return_inverse=True)
    again = np.flatnonzero(first[members.reshape(-1)] != np.arange(len(rows)))
    places = [
        {"place": store.place(int(rows[i])), "same_as": store.place(int(rows[first[members.reshape(-1)[i]]]))}
        for i in again[:NUM_PLACES]
    ]
    return {"rows": len(again), "places": places}


def _shared_rows(evaluation: ExampleStore, train: ExampleStore) -> dict[str, Any]:
    """Evaluation rows whose normalised content is also trained on."""
    rows = np.flatnonzero(evaluation.pieces == 0)
    known, where = np.unique(train.row_hashes, return_index=True)
    hashes = evaluation.row_hashes[rows]
    shared = np.flatnonzero(np.isin(hashes, known))
    places = []
    for i in shared[:NUM_PLACES]:
        twin = int(where[np.searchsorted(known, hashes[i])])
        places.append({"place": evaluation.place(int(rows[i])), "same_as": train.place(twin)})
    return {"rows": len(shared), "places": places}


def describe(report: Mapping[str, Any]) -> str:
    """The report as text for a terminal, one block per source and one for the whole."""
    lines: list[str] = []
    for source in report["sources"]:
        lines += _describe_source(source)
    lines += _describe_whole(report)
    return "\n".join(lines)


def _describe_source(source: Mapping[str, Any]) -> list[str]:
    columns = ", ".join(
        ours if ours == theirs else f"{ours} = {theirs}"
        for ours, theirs in source["format"]["columns"].items()
    )
    supervised = _share(source["supervised_tokens"], source["tokens"])
    lines = [
        f"{source['name']} ({source['use']}): {source['path']}",
        f"  format     {source['format']['name']} ({columns})",
        f"  rows       {source['rows']:,} read, {source['rows_kept']:,} kept",
        f"  examples   {source['examples']:,}: {source['tokens']:,} tokens, "
        f"{source['supervised_tokens']:,} supervised ({supervised})",
    ]
    if source["truncated_examples"]:
        lines.append(
            f"  truncated  {source['truncated_examples']:,} "
            f"({source['truncated_answers']:,} lost tokens of an answer): "
            f"{source['tokens_cut']:,} tokens, {source['supervised_tokens_cut']:,} supervised, are lost"
        )
    for word in ("dropped", "fixed"):
        for rule, entry in source[word].items():
            lines += _describe_rule(word, rule, entry)
    if source["control_tokens_typed"]:
        lines.append(f"  control    {source['control_tokens_typed']:,} control tokens are typed in texts")
    for text, entry in source["warnings"].items():
        lines.append(f"  warning    {entry['examples']:,} × {text}, first at {entry['places'][0]}")
    lines += _describe_lengths(source["length_histogram"])
    if source.get("sample"):
        lines.append(f"  first row  {source['sample']['place']}")
        lines += [f"    {name}: {text}" for name, text in source["sample"]["row"].items()]
    return [*lines, ""]


def _describe_rule(word: str, rule: str, entry: Mapping[str, Any]) -> list[str]:
    head = f"  {word:<10} {counted(entry['rows'], 'row')}, {rule}: {RULES[rule].what}"
    if word == "fixed":
        head += f"; {RULES[rule].fix}"
    else:
        head += f", {entry['tokens']:,} tokens ({entry['supervised_tokens']:,} supervised) lost"
    return [head, *(f"    {place['place']}: {place['what']}" for place in entry["places"])]


def _describe_lengths(histogram: Sequence[Mapping[str, int]]) -> list[str]:
    most = max((row["examples"] for row in histogram), default=0)
    lines = ["  lengths    up to tokens · examples · supervised"] if histogram else []
    for row in histogram:
        bar = ("█" * round(24 * row["examples"] / most) or "▏") if row["examples"] else ""
        share = _share(row["supervised_tokens"], row["tokens"])
        lines.append(f"    {row['up_to_tokens']:>9,} {row['examples']:>9,} {share:>6}  {bar}")
    return lines


def _describe_whole(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for use in ("train", "eval"):
        counts = report[use]
        if counts is not None:
            lines.append(
                f"{use:<6} {counts['examples']:,} examples, {counts['tokens']:,} tokens, "
                f"{counts['supervised_tokens']:,} supervised; the longest has {counts['longest_tokens']:,}"
            )
    if "packing" in report:
        lines += _describe_packing(report["packing"])
    if report.get("stamped_date"):
        lines.append(f"date   the template stamps {report['stamped_date']}, now and when the run is resumed")
    lines += _describe_lost(report["totals"])
    for key, text in (
        ("duplicate_rows", "training rows equal an earlier one"),
        ("eval_rows_in_training", "evaluation rows are in the training data"),
    ):
        found = report[key]
        if found["rows"]:
            lines.append(f"note   {found['rows']:,} {text}:")
            lines += [f"    {pair['place']} = {pair['same_as']}" for pair in found["places"]]
    return lines


def _describe_lost(totals: Mapping[str, Any]) -> list[str]:
    """Every token of the data that is not trained on: of dropped rows, and of examples cut short."""
    if not totals["rows_dropped"] and not totals["tokens_lost"]:
        return []
    origin = f": {totals['tokens_dropped']:,} of dropped rows, {totals['tokens_cut']:,} cut off"
    return [
        f"lost   {totals['rows_dropped']:,} of {totals['rows']:,} rows; {totals['tokens_lost']:,} tokens, "
        f"{totals['supervised_tokens_lost']:,} supervised{origin if totals['tokens_cut'] else ''}"
    ]


def _describe_packing(packing: Mapping[str, Any]) -> list[str]:
    full = "" if packing["fill"] is None else f", {packing['fill']:.0%} of {packing['micro_tokens']:,}"
    return [
        f"pack   about {packing['examples_per_forward']:,.1f} examples, {packing['tokens_per_forward']:,.0f} "
        f"tokens, to a forward{full}; padded instead, {packing['padding_if_padded']:.0%} would be padding"
    ]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
