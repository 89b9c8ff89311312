"""The cache cleans up after itself, a run keeps its date, and the report forecasts packing."""

import datetime
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from test_prepare import TEMPLATE, listed, rows, run, write

from burnish.config.schema import Config
from burnish.data import stamp
from burnish.data.cache import UNUSED_SECONDS
from burnish.data.report import describe
from burnish.errors import DataError

STAMPING = "{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}" + TEMPLATE


def _on(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setattr(stamp, "today", lambda: datetime.date(2026, 3, day))


def _parts(folder: Path) -> list[Path]:
    return sorted(file.parent for file in (folder / "runs" / ".burnish-cache").glob("*/summary.json"))


def test_no_lock_is_left_behind(tmp_path):
    run(tmp_path, write(tmp_path / "a.jsonl", rows(5)))
    cache = tmp_path / "runs" / ".burnish-cache"
    assert [file.name for file in cache.iterdir()] == [part.name for part in _parts(tmp_path)]


def test_parts_that_nobody_uses_are_cleared_away(tmp_path):
    used, unused = write(tmp_path / "a.jsonl", rows(5)), write(tmp_path / "b.jsonl", rows(6))
    run(tmp_path, unused)
    [old] = _parts(tmp_path)
    long_ago = time.time() - UNUSED_SECONDS - 60
    (tmp_path / "runs" / ".burnish-cache" / ".lock-old").touch()
    for file in (old / "summary.json", tmp_path / "runs" / ".burnish-cache" / ".lock-old"):
        os.utime(file, (long_ago, long_ago))
    prepared = run(tmp_path, used)
    assert not old.exists() and len(_parts(tmp_path)) == 1
    assert not list((tmp_path / "runs" / ".burnish-cache").glob(".lock-*"))
    # Use keeps a part: it is as good as new afterwards, and still there a run later.
    [part] = _parts(tmp_path)
    nearly = time.time() - UNUSED_SECONDS + 3600
    os.utime(part / "summary.json", (nearly, nearly))
    assert listed(run(tmp_path, used).train) == listed(prepared.train)
    assert time.time() - (part / "summary.json").stat().st_mtime < 3600


def test_mapped_data_outlives_its_files(tmp_path):
    prepared = run(tmp_path, write(tmp_path / "a.jsonl", rows(5)))
    before = listed(prepared.train)
    shutil.rmtree(tmp_path / "runs" / ".burnish-cache")
    assert listed(prepared.train) == before


def test_a_template_that_stamps_the_date_is_prepared_anew_on_another_day(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", rows(5))
    _on(monkeypatch, 1)
    first = run(tmp_path, path, template=STAMPING)
    assert first.report["stamped_date"] == "2026-03-01" and "stamps 2026-03-01" in describe(first.report)
    _on(monkeypatch, 2)
    second = run(tmp_path, path, template=STAMPING)
    assert listed(first.train) != listed(second.train) and first.fingerprint != second.fingerprint
    # A template without a date does not care.
    plain = run(tmp_path, path).fingerprint
    _on(monkeypatch, 3)
    assert run(tmp_path, path).fingerprint == plain
    assert run(tmp_path, path).report["stamped_date"] is None


def test_a_run_that_goes_on_another_day_keeps_its_date(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", rows(5))
    _on(monkeypatch, 1)
    first = run(tmp_path, path, template=STAMPING)
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "data_report.json").write_text(json.dumps(first.report))
    _on(monkeypatch, 2)
    again = run(tmp_path, path, template=STAMPING)
    assert again.fingerprint == first.fingerprint and again.report["stamped_date"] == "2026-03-01"
    step, link = folder / "checkpoints" / "step-00000001", tmp_path / "latest"
    step.mkdir(parents=True)
    link.symlink_to(step)
    for named in (step, link):
        raw = {
            "model": {"path": "a/b"},
            "data": {"train": str(path)},
            "output_dir": str(tmp_path / "other"),
            "checkpoint": {"resume": str(named)},
        }
        assert stamp.date_of_run(Config.model_validate(raw)) == datetime.date(2026, 3, 1), named
    (folder / "data_report.json").write_text("{damaged")
    assert run(tmp_path, path, template=STAMPING).report["stamped_date"] == "2026-03-02"


def test_the_epoch_of_reproducible_builds_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(24 * 3600))
    prepared = run(tmp_path, write(tmp_path / "a.jsonl", rows(3)), template=STAMPING)
    assert prepared.report["stamped_date"] == "1970-01-02"


@pytest.mark.parametrize("keys", [{}, {"mix": "weighted"}, {"packing": "off"}])
def test_the_report_says_what_packing_will_give(tmp_path, keys):
    path = write(tmp_path / "a.jsonl", rows(300))
    prepared = run(tmp_path, path, **keys)
    packing = prepared.report["packing"]
    assert packing["micro_tokens"] >= 64 and 0 < packing["fill"] <= 1
    assert 0 < packing["padding_if_padded"] < 1
    mean = prepared.train.num_tokens.mean()
    assert packing["tokens_per_forward"] / packing["examples_per_forward"] == pytest.approx(mean, rel=0.1)
    assert "to a forward" in describe(prepared.report) and "would be padding" in describe(prepared.report)


def test_too_long_rows_stop_the_run_or_go_as_the_key_says(tmp_path):
    values = [{"prompt": "Say it", "completion": "word " * n} for n in (3, 300, 400)]
    path = write(tmp_path / "a.jsonl", values)
    with pytest.raises(DataError) as caught:
        run(tmp_path, path, too_long="error", bad_rows="drop", max_bad_fraction=1.0)
    said = str(caught.value)
    assert f"{path}:2" in said and f"{path}:3" in said and f"{path}:1" not in said
    # Two thirds of the rows go, and none of them counts as bad: the config asked for it.
    dropped = run(tmp_path, path, too_long="drop", max_bad_fraction=0.0).report
    entry = dropped["sources"][0]["dropped"]["too_long"]
    assert entry["rows"] == 2 and entry["supervised_tokens"] > 600
    # By a rule of its own it does.
    with pytest.raises(DataError, match="max_bad_fraction"):
        run(tmp_path, path, too_long="error", bad_row_rules={"too_long": "drop"}, max_bad_fraction=0.5)
    with pytest.raises(DataError, match="no row of it can be trained on"):
        run(tmp_path, write(tmp_path / "b.jsonl", values[1:]), too_long="drop")
