"""A run as one self-contained HTML page: curves, result, plan, data, config. Everything escaped."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2

from burnish import __version__
from burnish.durable import replace_text
from burnish.errors import ConfigError, Problem, writing
from burnish.metrics.lines import read_lines

WIDTH, HEIGHT, MARGIN = 640, 220, 72  # room for a label like 5.556e-08
NUM_POINTS = 600
"""A curve keeps at most so many points: the mean of each stretch."""
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "tokenizers")


@dataclass(frozen=True)
class Line:
    """One polyline of a chart, in its own coordinates."""

    name: str
    points: str
    """As SVG takes them: `x,y x,y`."""
    style: str


@dataclass(frozen=True)
class Chart:
    """A chart: lines over steps, with a few numbers on both axes."""

    title: str
    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    num_not_finite: int


def write_report(run: Path, out: Path | None = None, answers: Sequence[Mapping[str, str]] = ()) -> Path:
    """Write the page.

    Args:
        run: A run's output_dir; what is missing there is left out of the page.
        out: The page; `run/report.html` unless given.
        answers: Held-out prompts with `prompt`, `answer`, `before` and `after`, to show.

    Raises:
        ConfigError: The folder is no run.
        MachineError: The page cannot be written.
    """
    if not (run / "metrics.jsonl").is_file():
        cure = "Give the output_dir of a run that has begun to train."
        raise ConfigError(Problem(str(run), "is not a run (no metrics.jsonl)", cure))
    metrics = list(read_lines(run / "metrics.jsonl"))
    page = _render(run, metrics, answers)
    target = out or run / "report.html"
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, page)
    return target


def _render(run: Path, metrics: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, str]]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = resources.files("burnish.report").joinpath("run.html.jinja").read_text(encoding="utf-8")
    train = [line for line in metrics if line.get("kind") == "train"]
    evals = [line for line in metrics if line.get("kind") == "eval"]
    events = [line for line in metrics if line.get("kind") not in ("train", "eval")]
    plan = _read_json(run / "plan.json")
    data = _read_json(run / "data_report.json")
    return environment.from_string(text).render(
        name=run.resolve().name,
        version=__version__,
        facts=[*_facts(train, evals, plan), *_data_facts(data)],
        charts=_charts(train, evals),
        plan=_flat(plan),
        data=json.dumps(data, indent=2, ensure_ascii=False) if data else "",
        events=[json.dumps(event, ensure_ascii=False) for event in events[-50:]],
        config=_read_text(run / "config.yaml"),
        answers=answers,
        packages=_versions(),
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
    )


def _facts(
    train: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if train:
        last = train[-1]
        seconds = sum(line["seconds"] for line in train)
        tokens = sum(line["num_tokens"] for line in train)
        facts += [("steps", f"{last['step']:,}"), ("epochs", f"{last['epoch']:.2f}")]
        facts += [("training loss, last step", f"{last['loss']:.4f}")]
        facts += [("tokens per second", f"{tokens / seconds:,.0f}" if seconds else "unknown")]
        peaks = [line["peak_memory_bytes"] for line in train if line["peak_memory_bytes"]]
        if peaks:
            facts.append(("peak memory", f"{max(peaks) / 2**30:.2f} GiB{_planned_memory(plan)}"))
        split = _time_split(train)
        if split:
            facts.append(("time of the steps", split))
        skipped = sum(not line.get("applied", True) for line in train)
        if skipped:
            facts.append(("skipped steps", f"{skipped:,}"))
    if evals:
        best = min(evals, key=lambda line: line["loss"] if math.isfinite(line["loss"]) else math.inf)
        facts += [("evaluation loss, first", f"{evals[0]['loss']:.4f}")]
        facts += [("evaluation loss, last", f"{evals[-1]['loss']:.4f}")]
        facts += [("evaluation loss, best", f"{best['loss']:.4f} at step {best['step']:,}")]
    return facts


def _data_facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know of the data to trust the numbers above (the file may be anybody's)."""
    facts = []
    for key, label in (
        ("eval_rows_in_training", "evaluation rows that are trained on too"),
        ("duplicate_rows", "training rows equal to an earlier one"),
    ):
        found = data.get(key)
        rows = found.get("rows") if isinstance(found, dict) else None
        if isinstance(rows, int) and rows:
            facts.append((label, f"{rows:,}"))
    return facts


def _planned_memory(plan: Mapping[str, Any]) -> str:
    """What was planned of a rank's memory; empty where the file does not say (it may be anybody's)."""
    parts = plan.get("memory_bytes")
    total = parts.get("total") if isinstance(parts, dict) else None
    return f", {total / 2**30:.2f} GiB planned" if isinstance(total, int | float) else ""


def _time_split(train: Sequence[Mapping[str, Any]]) -> str:
    """Where the steps' time went on rank 0; empty where it was not measured."""
    seconds: Counter[str] = Counter()
    for line in train:
        seconds.update(line.get("phase_seconds") or {})
    whole = seconds.total()
    return ", ".join(f"{name} {part / whole:.1%}" for name, part in seconds.items()) if whole else ""


def _charts(train: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> list[Chart]:
    curves = {
        "loss": {"training": _series(train, "loss"), "evaluation": _series(evals, "loss")},
        "gradient norm, before clipping": {"gradient norm": _series(train, "grad_norm")},
        "learning rate": {"learning rate": _series(train, "lr")},
        "tokens per second": {"tokens per second": _series(train, "tokens_per_second")},
    }
    charts = [_chart(title, lines) for title, lines in curves.items()]
    return [chart for chart in charts if chart is not None]


Series = list[tuple[float, float]]


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
    return [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]


def _chart(title: str, named: Mapping[str, Series]) -> Chart | None:
    points = {name: [p for p in series if math.isfinite(p[1])] for name, series in named.items()}
    everything = [point for series in points.values() for point in series]
    if not everything:
        return None
    low_x, high_x = min(x for x, _ in everything), max(x for x, _ in everything)
    low_y, high_y = min(y for _, y in everything), max(y for _, y in everything)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        up = (y - low_y) / (high_y - low_y) if high_y > low_y else 0.5
        return MARGIN + across * (WIDTH - MARGIN - 10), HEIGHT - 24 - up * (HEIGHT - 40)

    lines = []
    for style, (name, series) in zip(("first", "second"), points.items(), strict=False):
        if series:
            drawn = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in _thin(series))
            lines.append(Line(name, drawn, style))
    return Chart(
        title,
        lines,
        [(place(x, low_y)[0], f"{x:,.0f}") for x in dict.fromkeys((low_x, (low_x + high_x) // 2, high_x))],
        [(place(low_x, y)[1], f"{y:.4g}") for y in dict.fromkeys((low_y, (low_y + high_y) / 2, high_y))],
        sum(len(named[name]) - len(points[name]) for name in named),
    )


def _thin(series: Series) -> Series:
    if len(series) <= NUM_POINTS:
        return series
    size = math.ceil(len(series) / NUM_POINTS)
    stretches = [series[i : i + size] for i in range(0, len(series), size)]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((prefix + key, f"{value:,}"))
        else:
            rows.append((prefix + key, json.dumps(value, ensure_ascii=False)))
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _versions() -> list[tuple[str, str]]:
    found = [("burnish", __version__)]
    for package in _PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found
