"""Files that are empty, break off or hold something else: a named rule and a place; never a traceback."""

import json
import math

import pytest
from rows_on_the_spot import GOOD, line, run_file, said

from burnish.config.schema import SourceConfig
from burnish.data.load import read_rows
from burnish.errors import DataError


@pytest.mark.parametrize("content", [b"", b"\n\n"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json"])
def test_empty_files(tmp_path, content, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match="there are no rows in it"):
        run_file(tmp_path / f"a.{suffix}")


def test_a_file_of_garbage(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\x80\x81\n\xff\xfe\n")
    with pytest.raises(DataError, match="none of the first 2 rows can be read") as caught:
        run_file(tmp_path / "a.jsonl")
    assert "a.jsonl:2" in str(caught.value)


def test_a_byte_order_mark_is_left_out(tmp_path):
    for suffix, content in (("jsonl", line(GOOD)), ("csv", b"prompt,completion\nHi,Hello\n")):
        path = tmp_path / f"bom.{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + content)
        prepared = run_file(path)
        assert list(prepared.report["sources"][0]["fixed"]) == ["byte_order_mark"]
        assert len(prepared.train) == 1
        with pytest.raises(DataError, match="byte_order_mark"):
            run_file(path, bad_row_rules={"byte_order_mark": "error"})


def test_the_last_line_cut_off(tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl:5") as caught:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join([line(GOOD)] * 4 + [line(GOOD)[:-9]]))
        run_file(path)
    assert "invalid_json" in str(caught.value) and "the last one may be cut off" in str(caught.value)


@pytest.mark.parametrize("suffix", ["json", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "jsonl.zst", "json.gz"])
def test_a_file_that_breaks_off_is_not_taken_for_whole(tmp_path, suffix):
    import bz2
    import gzip
    import lzma
    import random

    import pyarrow as pa

    letters = random.Random(0)
    rows = [said("".join(letters.choices("abcdefgh", k=400))) for _ in range(1000)]
    plain = json.dumps(rows).encode() if "json" in suffix.split(".") else b"\n".join(map(line, rows))
    pack = {
        "gz": gzip.compress,
        "xz": lzma.compress,
        "bz2": bz2.compress,
        "zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
    }.get(suffix.rpartition(".")[2], bytes)
    path = tmp_path / f"rows.{suffix}"
    packed = pack(plain)
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="unreadable_rest"):  # bad_rows: drop does not drop half a file
        run_file(path, bad_rows="drop")
    if suffix in ("jsonl.bz2", "json.gz"):
        return  # nothing in front of the break can be unpacked: no rows to go on with
    chosen = run_file(path, bad_row_rules={"unreadable_rest": "drop", "invalid_json": "drop"})
    assert 0 < len(chosen.train) < 1000


def test_a_json_array_with_a_flaw_in_the_middle(tmp_path):
    text = json.dumps([GOOD] * 5, indent=1).replace('"role": "user"', '"role" "user"', 3)
    (tmp_path / "a.json").write_text("[" + json.dumps(GOOD) + "," + text[1:])
    with pytest.raises(DataError, match="unreadable_rest"):
        run_file(tmp_path / "a.json")


@pytest.mark.parametrize("between", ["", "\n", " " * 100])
@pytest.mark.parametrize("first", ["[]", json.dumps([GOOD])])
def test_json_arrays_put_end_to_end_lose_no_row_in_silence(tmp_path, between, first):
    (tmp_path / "a.json").write_text(first + between + json.dumps([GOOD]) + "\n")
    rows = list(read_rows(SourceConfig(path=str(tmp_path / "a.json"))))
    assert rows[-1].problem is not None and rows[-1].problem.rule == "unreadable_rest"
    assert "put end to end" in rows[-1].problem.message


@pytest.mark.parametrize("between", [b"", b"\n"])
def test_rows_inside_an_object_keep_what_is_wrong_with_their_bytes(tmp_path, between):
    good = json.dumps(GOOD).encode()
    rows = b",".join([good, good.replace(b"user", b'user", "name": "\xff'), good])
    (tmp_path / "a.json").write_bytes(b'{"data": [' + between + rows + b"]}")
    with pytest.raises(DataError, match=r"a.json#1: byte \d+ is not UTF-8.*\[invalid_utf8\]") as caught:
        run_file(tmp_path / "a.json")
    assert "a.json#0" not in str(caught.value) and "a.json#2" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"a": %s}\n', '{"a":\n%s}'])
def test_json_nested_too_deeply_is_a_verdict(tmp_path, text):
    for depth in (20_000, 100_000):  # within the piece that is looked at first, and beyond it
        (tmp_path / "a.json").write_text(text % ("[" * depth + "]" * depth))
        with pytest.raises(DataError, match=r"\[(invalid_json|unreadable_rest)\]"):
            run_file(tmp_path / "a.json")


def test_csv_with_ragged_lines_and_nan(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        'instruction,input,output\nSay,nan,one\nSay,two,"three",four\nSay,,five\nSay\nSay,x,nan\nSay,,NA\n'
    )
    with pytest.raises(DataError) as caught:
        run_file(path)
    message = str(caught.value)
    assert "a.csv:3: 4 cells under 3 columns" in message and "a.csv:5: 1 cell under 3 columns" in message
    assert "invalid_csv: 2 rows: the line has more or fewer cells than the header" in message
    assert "a.csv:6: output is NaN, as pandas writes an empty cell [content_missing]" in message
    source = run_file(path, bad_rows="drop").report["sources"][0]
    assert source["rows_kept"] == 3 and source["fixed"]["content_nan"]["rows"] == 1
    with pytest.raises(DataError, match=r"a.csv:2: input is NaN \[content_nan\]"):
        run_file(path, bad_row_rules={"content_nan": "error"})


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_that_cannot_be_read_has_a_cure(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"not a table")
    with pytest.raises(DataError, match="not a readable") as caught:
        run_file(tmp_path / f"a.{suffix}")
    assert all(problem.cure for problem in caught.value.problems)


def test_a_csv_quote_that_never_ends(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\nHi,Hello\nHi,"Hello\nHi,Hello\n')
    with pytest.raises(DataError, match="unreadable_rest"):
        run_file(tmp_path / "a.csv", bad_rows="drop")


def test_nan_in_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"instruction": ["Say"] * 3, "input": ["one", None, math.nan], "output": ["a", "b", None]}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet#2: output is empty \[content_missing\]"):
        run_file(tmp_path / "a.parquet")


def test_sources_with_other_schemas_in_both_orders(tmp_path):
    alpaca, chat, text = tmp_path / "a.csv", tmp_path / "b.jsonl", tmp_path / "c.parquet"
    alpaca.write_text("instruction,output\nSay,one\n")
    chat.write_bytes(
        line({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]})
    )
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"text": "Once"}, {"text": ""}, {"text": "again"}]), text)
    kinds = {"a": "alpaca", "b": "sharegpt", "c": "text"}
    for order in ((alpaca, chat, text), (text, chat, alpaca)):
        prepared = run_file(*order, bad_rows="drop")
        found = {s["name"]: s["format"]["name"] for s in prepared.report["sources"]}
        assert found == kinds and len(prepared.train) == 4
        assert prepared.report["totals"]["rows_dropped"] == 1  # "empty_text"
