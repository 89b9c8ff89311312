"""The run's page: self-contained, everything escaped, whatever a run has left."""

import json
from html.parser import HTMLParser

import pytest

from burnish.errors import ConfigError
from burnish.report import run_report
from burnish.report.run_report import write_report

EVIL = "</pre><script>alert(1)</script>"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def step(number: int, loss: object) -> dict:
    return {
        "kind": "train",
        "step": number,
        "epoch": number / 10,
        "loss": loss,
        "lr": 1e-4,
        "grad_norm": None,
        "num_tokens": 100,
        "tokens_per_second": 50.0,
        "peak_memory_bytes": 2**30,
        "seconds": 2.0,
    }


def test_the_page_holds_everything_and_escapes_it(tmp_path):
    lines = [step(number, 2.0 / number) for number in range(1, 1500)] + [step(1500, "NaN")]
    lines.append({"kind": "eval", "step": 1500, "loss": 0.5})
    lines.append({"kind": "skipped", "step": 1500, "why": EVIL})
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text(f"output_dir: {EVIL}\n")
    (tmp_path / "plan.json").write_text(json.dumps({"num_steps": 1500, "memory_bytes": {"total": EVIL}}))
    (tmp_path / "data_report.json").write_text(json.dumps({"sources": [EVIL]}))
    answers = [{"prompt": EVIL, "answer": "a", "before": "b", "after": "a"}]
    page = write_report(tmp_path, answers=answers).read_text()
    tags = Tags()
    tags.feed(page)
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe"}
    assert not [a for _, a in tags.seen if "src" in a or "href" in a or any(k.startswith("on") for k in a)]
    assert page.count("alert(1)") == 5
    curves = [attributes["points"] for tag, attributes in tags.seen if tag == "polyline"]
    assert len(curves) == 4 and all("nan" not in curve for curve in curves)
    assert len(curves[0].split()) <= 600
    assert "1 values were not finite" in page and "1,500" in page


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1, 2.0)) + "\n")
    (tmp_path / "plan.json").write_text(json.dumps({"memory_bytes": {"total": 3 * 2**29}}))
    page = write_report(tmp_path, tmp_path / "a" / "b.html").read_text()
    assert "<polyline" in page and "1.00 GiB, 1.50 GiB planned" in page
    (tmp_path / "metrics.jsonl").write_text("")
    write_report(tmp_path)


def test_what_the_numbers_must_be_read_with(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1, 2.0)) + "\n")
    report = {"eval_rows_in_training": {"rows": 1234}, "duplicate_rows": {"rows": 0}}
    (tmp_path / "data_report.json").write_text(json.dumps(report))
    facts, _, rest = write_report(tmp_path).read_text().partition("<h2>")
    assert "evaluation rows that are trained on too</span><b>1,234</b>" in facts and rest
    assert "equal to an earlier one" not in facts
    (tmp_path / "data_report.json").write_text(json.dumps({"eval_rows_in_training": {"rows": EVIL}}))
    assert "trained on too" not in write_report(tmp_path).read_text()


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run"):
        write_report(tmp_path)


def test_a_small_learning_rate_is_not_cut_off_at_its_first_digits():
    """`5.556e-08` came out as `56e-08`. A letter of 12 px is about 7 wide."""
    chart = run_report._chart("learning rate", {"learning rate": [(1.0, 5.5555e-8), (2.0, 9.8333e-6)]})
    assert chart is not None
    assert max(7 * len(label) for _, label in chart.y_ticks) <= run_report.MARGIN - 6
