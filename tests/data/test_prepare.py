"""Prepared once, the same however it is prepared, and never stale."""

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers_on_the_spot import byte_level

from burnish.config.schema import Config
from burnish.data import prepare as prepare_module
from burnish.data.holdout import held_out_examples
from burnish.data.prepare import PreparedData, cache_folder, prepare
from burnish.data.report import describe
from burnish.data.store import ExampleStore
from burnish.data.tokenizer import builtin_templates
from burnish.data.windows import plan_windows
from burnish.errors import DataError, MachineError

TOKENIZER = byte_level(["<|im_start|>", "<|im_end|>"])
TEMPLATE = builtin_templates()["chatml"]


def rows(count: int, word: str = "number") -> list[dict]:
    return [{"prompt": f"Say {word} {i}", "completion": f"{i} " * (i % 7 + 1)} for i in range(count)]


def write(path: Path, values: list[dict]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def config(folder: Path, *paths: str, seed: int = 42, **data) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "output_dir": str(folder / "runs" / "first"),
            "train": {"seed": seed},
            "data": {"train": list(paths), "max_tokens": 64, **data},
        }
    )


def run(folder: Path, *paths: str, tokenizer=TOKENIZER, template=TEMPLATE, **keys) -> PreparedData:
    return prepare(config(folder, *paths, **keys), tokenizer, template)


def listed(store: ExampleStore) -> list[tuple]:
    examples = [store[i] for i in range(len(store))]
    return [(e.source, e.row, e.token_ids.tolist(), e.weights.tolist()) for e in examples]


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(1500))
    one = run(tmp_path, path, num_workers=1, cache_dir=str(tmp_path / "one"))
    two = run(tmp_path, path, num_workers=2, cache_dir=str(tmp_path / "two"))
    assert listed(one.train) == listed(two.train)
    assert one.fingerprint == two.fingerprint and one.report == two.report
    files = [next((tmp_path / name).glob("*/tokens.arrow")) for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_second_call_reads_what_the_first_wrote(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", rows(30))
    first = run(tmp_path, path)
    assert cache_folder(config(tmp_path, path)) == tmp_path / "runs" / ".burnish-cache"

    def never(*_, **__):
        raise AssertionError("prepared anew")

    monkeypatch.setattr(prepare_module, "read_rows", never)
    second = run(tmp_path, path, packing="off", mix="weighted", max_bad_fraction=0.5, num_workers=2)
    assert listed(first.train) == listed(second.train) and first.report == second.report
    with pytest.raises(AssertionError, match="prepared anew"):
        run(tmp_path, path, max_tokens=65)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 63},
        {"too_long": "split"},
        {"train_on": "last_assistant"},
        {"control_tokens": "allow"},
        {"bad_rows": "drop"},
        {"bad_row_rules": {"empty_answer": "drop"}},
        {"template": TEMPLATE + "\n"},
        {"tokenizer": byte_level(["<|im_start|>", "<|im_end|>", "<|other|>"])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_result_prepares_anew(tmp_path, change):
    path = write(tmp_path / "a.jsonl", rows(5))
    run(tmp_path, path)
    before = set((tmp_path / "runs" / ".burnish-cache").glob("[!.]*"))
    run(tmp_path, path, **change)
    after = set((tmp_path / "runs" / ".burnish-cache").glob("[!.]*"))
    assert len(after - before) == 1


def test_another_content_prepares_anew_though_size_and_time_are_the_same(tmp_path):
    import os

    path = tmp_path / "a.jsonl"
    write(path, rows(5))
    stat = path.stat()
    first = run(tmp_path, str(path))
    write(path, rows(5, "nombre"))
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(tmp_path, str(path)).fingerprint != first.fingerprint


def test_equal_data_has_an_equal_fingerprint_wherever_it_lies(tmp_path):
    a = run(tmp_path, write(tmp_path / "a.jsonl", rows(5)))
    b = run(tmp_path, write(tmp_path / "b.jsonl", rows(5)))
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != run(tmp_path, str(tmp_path / "a.jsonl"), eval_fraction=0.4).fingerprint


def test_the_fingerprint_is_that_of_the_training_data_alone(tmp_path):
    """A run that is resumed may evaluate on other rows; it may not hold out others."""
    train, own = write(tmp_path / "a.jsonl", rows(20)), write(tmp_path / "b.jsonl", rows(5, "other"))
    plain = run(tmp_path, train).fingerprint
    assert run(tmp_path, train, eval=own).fingerprint == plain
    write(tmp_path / "b.jsonl", rows(6, "changed"))
    assert run(tmp_path, train, eval=own).fingerprint == plain
    assert run(tmp_path, train, eval_fraction=0.2).fingerprint != plain
    assert run(tmp_path, own).fingerprint != plain


def test_damaged_parts_are_prepared_again(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(5))
    first = run(tmp_path, path)
    part = next((tmp_path / "runs" / ".burnish-cache").glob("*/tokens.arrow"))
    shutil.copy(part, tmp_path / "copy")
    part.write_bytes(b"")
    assert run(tmp_path, path).fingerprint == first.fingerprint
    assert part.read_bytes() == (tmp_path / "copy").read_bytes()


def _prepare_in_process(folder, path, queue):
    queue.put(run(Path(folder), path).fingerprint)


def test_two_runs_at_once_prepare_the_same(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(2000))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    both = [context.Process(target=_prepare_in_process, args=(tmp_path, path, queue)) for _ in range(2)]
    for process in both:
        process.start()
    prints = {queue.get(timeout=120) for _ in both}
    for process in both:
        process.join()
    assert prints == {run(tmp_path, path).fingerprint}
    assert not list((tmp_path / "runs" / ".burnish-cache").glob(".staging-*"))


KILLED = """
import sys
sys.path[:0] = {paths!r}
import test_prepare
from pathlib import Path
test_prepare.run(Path({folder!r}), {path!r})
"""


def test_a_killed_preparation_starts_clean(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(60_000))
    code = KILLED.format(paths=[str(Path(__file__).parent), *sys.path], folder=str(tmp_path), path=path)
    process = subprocess.Popen([sys.executable, "-c", code])
    cache = tmp_path / "runs" / ".burnish-cache"
    deadline = time.monotonic() + 120
    while not list(cache.glob(".staging-*/tokens.arrow")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(cache.glob(".staging-*")) and not list(cache.glob("*/summary.json"))
    write(tmp_path / "a.jsonl", rows(50))
    assert len(run(tmp_path, path).train) == 50
    assert not list(cache.glob(".staging-*"))


def test_a_cache_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(5))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match=r"data\.cache_dir"):
        run(tmp_path, path, cache_dir=str(tmp_path / "file"))


def test_held_out_rows_are_a_pure_function_of_seed_and_content(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(200))
    one = run(tmp_path, path, eval_fraction=0.1)
    assert one.eval is not None and len(one.eval) == 20 and len(one.train) == 180
    held_out = {row for _, row, *_ in listed(one.eval)}
    assert held_out.isdisjoint({row for _, row, *_ in listed(one.train)})
    again = run(tmp_path, path, eval_fraction=0.1, cache_dir=str(tmp_path / "other"))
    other = run(tmp_path, path, eval_fraction=0.1, seed=7)
    assert again.eval is not None and other.eval is not None
    assert listed(again.eval) == listed(one.eval) != listed(other.eval)
    # In another order of rows the same rows are held out.
    turned = run(tmp_path, write(tmp_path / "b.jsonl", rows(200)[::-1]), eval_fraction=0.1)
    assert turned.eval is not None
    texts = [sorted(ids for _, _, ids, _ in listed(store)) for store in (one.eval, turned.eval)]
    assert texts[0] == texts[1]


def test_twins_are_held_out_together(tmp_path):
    values = [row for row in rows(40) for _ in range(3)]
    prepared = run(tmp_path, write(tmp_path / "a.jsonl", values), eval_fraction=0.1)
    assert prepared.eval is not None and len(prepared.eval) == 12
    assert prepared.report["eval_rows_in_training"]["rows"] == 0
    assert prepared.report["duplicate_rows"]["rows"] == 72


def test_twins_of_other_formats_and_weights_are_held_out_together(tmp_path):
    def message(role: str, text: str, **keys) -> dict:
        return {"role": role, "content": text, **keys}

    pairs = [(f"Say {i}", f"{i} " * (i % 5 + 1)) for i in range(40)]
    twins = {
        "plain": [{"prompt": q, "completion": a} for q, a in pairs],
        "sides": [
            {"prompt": [message("user", q)], "completion": [message("assistant", a)]} for q, a in pairs
        ],
        "half": [{"messages": [message("user", q), message("assistant", a, weight=0.5)]} for q, a in pairs],
    }
    paths = [write(tmp_path / f"{name}.jsonl", values) for name, values in twins.items()]
    prepared = run(tmp_path, *paths, eval_fraction=0.2)
    assert prepared.eval is not None
    read = [{tuple(ids) for _, _, ids, _ in listed(store)} for store in (prepared.train, prepared.eval)]
    assert read[0].isdisjoint(read[1]) and len(prepared.eval) == 24

    tokens = [{"input_ids": [i, 5, 6], "labels": [-100, 5, 6]} for i in range(10, 30)]
    masked = [{**row, "labels": [-100, -100, 6]} for row in tokens]
    paths = [write(tmp_path / "whole.jsonl", tokens), write(tmp_path / "masked.jsonl", masked)]
    prepared = run(tmp_path, *paths, eval_fraction=0.2)
    assert prepared.eval is not None and len(prepared.eval) == 8


def test_something_is_held_out_and_something_is_left():
    hashes = np.array([5, 5, 5, 9], np.uint64)
    for seed in range(8):
        held_out = held_out_examples(hashes, 1, seed)
        assert 0 < held_out.sum() < 4


@pytest.mark.parametrize(
    ("values", "why"), [(rows(1), "only one training example"), (rows(1) * 5, "all 5 training examples")]
)
def test_nothing_to_hold_out_is_told_and_the_run_goes_on(tmp_path, caplog, values, why):
    prepared = run(tmp_path, write(tmp_path / "a.jsonl", values), eval_fraction=0.5)
    assert prepared.eval is None and len(prepared.train) == len(values)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and told[0].startswith("data.eval_fraction: is 0.5") and why in told[0]
    assert "Give data.eval" in told[0]


def test_a_source_held_out_whole_is_for_the_plan_to_refuse(tmp_path):
    a, b = write(tmp_path / "a.jsonl", rows(3)), write(tmp_path / "b.jsonl", rows(1, "other"))
    found = [run(tmp_path, a, b, mix="weighted", eval_fraction=0.25, seed=seed) for seed in range(12)]
    sizes = [data.report["train"]["sources"] for data in found]
    emptied = [data for data, size in zip(found, sizes, strict=True) if size["b"] == 0]
    assert 0 < len(emptied) < len(found)
    keys = config(tmp_path, a, b, mix="weighted", eval_fraction=0.25)
    with pytest.raises(
        DataError, match=r"b.jsonl has a weight but no usable example\n *Lower data.eval_fraction"
    ):
        plan_windows(emptied[0].train, keys.data, keys.batch, keys.train, world_size=1, packed=True)


def test_what_a_template_does_not_show_is_told_by_every_run(tmp_path, caplog):
    tools = [{"name": "find", "parameters": {"type": "object", "properties": {}}}]
    path = write(tmp_path / "a.jsonl", [row | {"tools": tools} for row in rows(3)])
    for _ in ("prepared", "found prepared"):
        caplog.clear()
        run(tmp_path, path, template=builtin_templates()["plain"])
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        what = "a: the template does not show the tools that the row offers"
        assert told == [f"{what} (3 examples, first at {path}:1)."]


def test_evaluation_sources_and_held_out_rows_are_evaluated_together(tmp_path):
    train = write(tmp_path / "a.jsonl", rows(20))
    own = write(tmp_path / "b.jsonl", rows(5, "other"))
    prepared = run(tmp_path, train, eval=own, eval_fraction=0.2)
    assert prepared.eval is not None
    assert prepared.eval.source_names == ("a", "b") and len(prepared.eval) == 9
    assert prepared.report["eval"]["sources"] == {"a": 4, "b": 5}
    same = run(tmp_path, train, eval=train)
    assert same.eval is not None and same.report["eval_rows_in_training"]["rows"] == 20


def test_max_examples_takes_the_first_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(20))
    source = {"path": path, "max_examples": 6, "name": "few"}
    prepared = prepare(
        Config.model_validate(
            {"model": {"path": "m"}, "output_dir": str(tmp_path / "o"), "data": {"train": [source]}}
        ),
        TOKENIZER,
        TEMPLATE,
    )
    assert [row for _, row, *_ in listed(prepared.train)] == [f"{path}:{n}" for n in range(1, 7)]
    assert prepared.train.source_names == ("few",)


def test_the_report_adds_up(tmp_path):
    a = write(tmp_path / "a.jsonl", rows(30))
    b = write(tmp_path / "b.jsonl", [{"text": "word " * n} for n in range(1, 40)])
    prepared = run(tmp_path, a, b, too_long="split")
    report = prepared.report
    assert json.loads(json.dumps(report)) == report
    for source, store_id in zip(report["sources"], (0, 1), strict=True):
        own = prepared.train.source_ids == store_id
        assert source["tokens"] == prepared.train.num_tokens[own].sum()
        assert source["supervised_tokens"] == prepared.train.num_supervised[own].sum()
        assert source["tokens"] == sum(row["tokens"] for row in source["length_histogram"])
        assert source["examples"] == sum(row["examples"] for row in source["length_histogram"])
    assert report["sources"][1]["rows_kept"] == 39 < report["sources"][1]["examples"]
    assert report["totals"]["rows"] == 69 and report["train"]["examples"] == len(prepared.train)
    text = describe(report)
    assert "a (train)" in text and "prompt_completion (prompt, completion)" in text
    assert "Say number 0" in text
