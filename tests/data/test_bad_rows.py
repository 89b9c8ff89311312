"""Every bad input gets its verdict: a named rule, a place, a policy; never a traceback.

The table holds the list of bad inputs that trainers trip over, one line each: what stands in the
file, which rule says so, and what becomes of the row by default, with `drop`, and with `fix`.
"""

import json
import math
from pathlib import Path

import pytest
from rows_on_the_spot import ANSWER, GOOD, TOKENIZER, USER, line, run, run_file, said

from burnish.config.row_rules import RULES
from burnish.data.report import describe
from burnish.errors import ConfigError, DataError

CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}

ERROR, DROP, FIX = "error", "drop", "fix"

# (name, the bad line, rule, what happens by default)
TABLE = [
    ("empty answer", line(said("")), "empty_answer", ERROR),
    ("blank answer", line(said(" \n")), "empty_answer", ERROR),
    ("content None", line(said(None)), "content_missing", ERROR),
    ("content missing", line({"messages": [USER, {"role": "assistant"}]}), "content_missing", ERROR),
    ("content a number", line(said(42)), "content_not_text", ERROR),
    ("content an object", line(said({"a": 1})), "content_not_text", ERROR),
    ("content a list of parts", line(said([{"type": "text", "text": "Hello"}])), "content_parts", FIX),
    ("content an image", line(said([{"type": "image", "url": "x"}])), "content_not_text", ERROR),
    ("content NaN", line(said(math.nan)), "content_missing", ERROR),
    ("unknown role", line(said("Hello", role="narrator")), "unknown_role", ERROR),
    ("role missing", line({"messages": [USER, {"content": "Hello"}]}), "unknown_role", ERROR),
    ("assistant first", line({"messages": [ANSWER, USER, ANSWER]}), "assistant_first", ERROR),
    ("two users in a row", line({"messages": [USER, USER, ANSWER]}), "repeated_role", ERROR),
    ("two assistants in a row", line({"messages": [USER, ANSWER, ANSWER]}), "repeated_role", ERROR),
    ("only a system turn", line({"messages": [{**USER, "role": "system"}]}), "no_assistant_turn", ERROR),
    ("last turn a user's", line({"messages": [USER, ANSWER, USER]}), "last_turn_not_assistant", FIX),
    ("no assistant turn", line({"messages": [USER]}), "no_assistant_turn", ERROR),
    ("empty messages", line({"messages": []}), "empty_messages", ERROR),
    ("messages null", line({"messages": None}), "content_missing", ERROR),
    ("messages a number", line({"messages": 3}), "messages_not_a_list", ERROR),
    ("messages of texts", line({"messages": ["Hi", "Hello"]}), "message_not_an_object", ERROR),
    ("messages as a string", line({"messages": json.dumps(GOOD["messages"])}), "messages_as_text", FIX),
    ("messages as no JSON", line({"messages": "Hi"}), "messages_not_a_list", ERROR),
    ("empty prompt", line({"messages": [{**USER, "content": ""}, ANSWER]}), "empty_prompt", ERROR),
    ("null row", b"null", "null_row", ERROR),
    ("row a list", b"[1, 2]", "null_row", ERROR),
    ("row a text", b'"hello"', "null_row", ERROR),
    ("invalid UTF-8", line(said("caf\xe9!")).replace(b"\\u00e9", b"\xe9"), "invalid_utf8", ERROR),
    ("lone surrogate", line(said("half \ud83d of it")), "lone_surrogate", ERROR),
    ("NUL", line(said("a\x00b")), "nul_character", ERROR),
    ("NUL in an argument", line({"messages": [USER, {**CALL, "name": "a\x00b"}]}), "nul_character", ERROR),
    ("a line cut off", line(GOOD)[:20], "invalid_json", ERROR),
    ("a line too many brackets", line(GOOD) + b"}", "invalid_json", ERROR),
    ("nested without end", b'{"messages": ' + b"[" * 100_000, "invalid_json", ERROR),
    ("wrong column", line({"conversation": GOOD["messages"]}), "missing_column", ERROR),
    ("tool calls a text", line({"messages": [USER, {**CALL, "tool_calls": "f()"}]}), "bad_tool_calls", ERROR),
    (
        "arguments no JSON",
        line({"messages": [USER, {**CALL, "tool_calls": [{"name": "f", "arguments": "{a: 1"}]}]}),
        "bad_tool_calls",
        ERROR,
    ),
    ("tools no list", line({**GOOD, "tools": 3}), "bad_tools", ERROR),
    ("weight negative", line({"messages": [USER, {**ANSWER, "weight": -1}]}), "bad_weight", ERROR),
    ("weight no float32", line({"messages": [USER, {**ANSWER, "weight": 1e39}]}), "bad_weight", ERROR),
    ("weight no float", line({"messages": [USER, {**ANSWER, "weight": 10**400}]}), "bad_weight", ERROR),
    ("train a word", line({"messages": [USER, {**ANSWER, "train": "yes"}]}), "bad_weight", ERROR),
    ("nothing trained", line({"messages": [USER, {**ANSWER, "train": False}]}), "no_supervised_tokens", DROP),
    (
        "prompt too long",
        line({"messages": [{**USER, "content": "word " * 900}, ANSWER]}),
        "prompt_too_long",
        DROP,
    ),
    (
        "half a megabyte",
        line({"messages": [{**USER, "content": "x" * 500_000}, ANSWER]}),
        "prompt_too_long",
        DROP,
    ),
    (
        "system refused",
        line({"messages": [{**USER, "role": "system"}, USER, ANSWER]}),
        "template_error",
        ERROR,
    ),
]
NAMES = [case[0] for case in TABLE]


@pytest.mark.parametrize(("what", "bad", "rule", "verdict"), TABLE, ids=NAMES)
def test_a_bad_row_gets_its_verdict(tmp_path, what, bad, rule, verdict):
    if verdict == ERROR:
        with pytest.raises(DataError) as caught:
            run(tmp_path, GOOD, bad)
        assert f"{tmp_path}/rows.jsonl:2" in str(caught.value)
        assert f"[{rule}]" in str(caught.value) and RULES[rule].cure in str(caught.value)
        assert caught.value.exit_code == 3
        return
    source = run(tmp_path, GOOD, bad).report["sources"][0]
    table = source["dropped" if verdict == DROP else "fixed"]
    assert list(table) == [rule]
    assert table[rule]["places"][0]["place"] == f"{tmp_path}/rows.jsonl:2"
    assert source["rows_kept"] == (4 if verdict == DROP else 5)


@pytest.mark.parametrize(("what", "bad", "rule", "verdict"), TABLE, ids=NAMES)
def test_a_bad_row_can_be_dropped_and_is_counted(tmp_path, what, bad, rule, verdict):
    prepared = run(tmp_path, GOOD, bad, bad_rows="drop", bad_row_rules={rule: "drop"})
    source = prepared.report["sources"][0]
    assert {name: entry["rows"] for name, entry in source["dropped"].items()} == {rule: 1}
    assert source["rows"] == 5 and source["rows_kept"] == len(prepared.train) == 4
    assert prepared.report["totals"]["rows_dropped"] == 1
    assert rule in describe(prepared.report)
    assert all(prepared.train[i].row.rpartition(":")[2] != "2" for i in range(4))


FIXABLE = [
    case
    for case in TABLE
    if RULES[case[2]].can_fix
    and case[0] not in ("content an object", "content an image", "messages as no JSON")
]


@pytest.mark.parametrize(("what", "bad", "rule", "verdict"), FIXABLE, ids=[case[0] for case in FIXABLE])
def test_what_can_be_fixed_is_fixed_and_counted(tmp_path, what, bad, rule, verdict):
    prepared = run(tmp_path, GOOD, bad, bad_row_rules={rule: "fix"})
    source = prepared.report["sources"][0]
    assert source["fixed"][rule]["rows"] == 1 and not source["dropped"]
    assert len(prepared.train) == 5
    text = TOKENIZER.decode(prepared.train[1].token_ids)
    assert "\x00" not in text and "assistant" in text


def test_every_rule_is_in_a_table_or_test():
    files = [Path(__file__), Path(__file__).with_name("test_bad_files.py")]
    here = "".join(file.read_text("utf-8") for file in files)
    assert not [name for name in RULES if name not in here]


def test_all_errors_of_all_sources_are_reported_at_once(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_bytes(b"\n".join([line(GOOD), *[line(said(""))] * 30]))
    second.write_bytes(b"\n".join([line({"text": "a text"}), b"{"]))
    with pytest.raises(DataError) as caught:
        run_file(first, second)
    message = str(caught.value)
    assert message.count("first.jsonl:") == 20 and "... and 11 more rows" in message
    assert "empty_answer: 30 rows" in message and "invalid_json: 1 row:" in message
    assert "data.bad_row_rules.empty_answer: drop" in message


def test_too_many_bad_rows_stop_even_when_they_are_dropped(tmp_path):
    with pytest.raises(DataError, match=r"1 of 4 rows \(25.00%\) cannot be trained on") as caught:
        run(tmp_path, said(""), bad_rows="drop", max_bad_fraction=0.2)
    assert "rows.jsonl:1" in str(caught.value) and "empty_answer" in str(caught.value)
    run(tmp_path, said(""), bad_rows="drop", max_bad_fraction=0.25)
    with pytest.raises(DataError, match=r"25\.00%"):  # found prepared now, and judged all the same
        run(tmp_path, said(""), bad_rows="drop", max_bad_fraction=0.2)


def test_rows_dropped_for_their_length_by_choice_are_not_bad(tmp_path):
    long = said("word " * 900)
    prepared = run(tmp_path, long, too_long="drop", max_bad_fraction=0.0)
    assert prepared.report["sources"][0]["dropped"]["too_long"]["tokens"] > 900
    with pytest.raises(DataError, match="too_long"):
        run(tmp_path, long, too_long="error")


def test_what_is_lost_is_counted_in_tokens(tmp_path):
    lost = run(tmp_path, said("a b c d", "e"), bad_rows="drop").report["totals"]
    answer = len(TOKENIZER("a b c d")["input_ids"]) + len(TOKENIZER("e")["input_ids"])
    assert lost["supervised_tokens_dropped"] == answer
    assert lost["tokens_dropped"] == answer + len(TOKENIZER("Hi")["input_ids"])


@pytest.mark.parametrize(
    ("bad", "rule", "tokens", "supervised"),
    [
        ({"input_ids": [5, 6, 999_999], "labels": [-100, -100, 999_999]}, "token_out_of_range", 3, 1),
        ({"input_ids": [5, 999_999], "labels": None}, "token_out_of_range", 2, 1),
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7]}, "bad_tokens", 4, 2),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "bad_tokens", 2, 0),
        ({"input_ids": "[5, 6, 7", "labels": [5]}, "bad_tokens", 0, 0),
        ({"input_ids": "[5, -6, 7]", "labels": [5, 6, 7]}, "bad_tokens", 3, 2),
        ({"input_ids": 5, "labels": [5]}, "bad_tokens", 0, 0),
        ({"input_ids": [5, 2**63], "labels": [5, 2**63]}, "token_out_of_range", 2, 1),
        ({"input_ids": [5, 6], "labels": [5, 6], "weights": [1, 10**400]}, "bad_tokens", 2, 1),
    ],
)
def test_lost_ready_made_tokens_are_counted(tmp_path, bad, rule, tokens, supervised):
    good = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    report = run(tmp_path, good, bad, num_good=0, bad_rows="drop", max_bad_fraction=1.0).report
    entry = report["sources"][0]["dropped"][rule]
    assert (entry["rows"], entry["tokens"], entry["supervised_tokens"]) == (1, tokens, supervised)
    assert report["totals"]["tokens_lost"] == tokens


def test_what_is_lost_is_what_was_dropped_and_what_was_cut_off(tmp_path):
    report = run(tmp_path, said("a b c d", ""), said("word " * 900), bad_rows="drop").report
    totals = report["totals"]
    assert totals["tokens_cut"] > 300 and totals["tokens_dropped"] > 0
    assert totals["tokens_lost"] == totals["tokens_cut"] + totals["tokens_dropped"]
    assert totals["supervised_tokens_lost"] >= totals["supervised_tokens_cut"] > 300
    assert f"{totals['tokens_lost']:,} tokens" in describe(report).split("lost   ")[1]
    only_cut = run(tmp_path, said("word " * 900)).report
    assert f"{only_cut['totals']['tokens_cut']:,} cut off" in describe(only_cut)


def test_truncated_answers_are_counted(tmp_path):
    source = run(tmp_path, said("word " * 900)).report["sources"][0]
    assert source["truncated_examples"] == source["truncated_answers"] == 1
    assert source["tokens_cut"] > 300 and source["supervised_tokens_cut"] > 300


def test_nothing_left_to_train_on(tmp_path):
    with pytest.raises(DataError, match="no row of it can be trained on"):
        run(tmp_path, said(""), said(None), num_good=0, bad_rows="drop")


def test_columns_of_no_format(tmp_path):
    with pytest.raises(DataError, match=r"columns \(foo, bar\) are of no known format"):
        run(tmp_path, {"foo": 1, "bar": 2}, num_good=0)


def test_ready_made_tokens(tmp_path):
    good = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    for bad, rule in (
        ({"input_ids": [5, 6, 999_999], "labels": [5, 6, 999_999]}, "token_out_of_range"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "bad_tokens"),
        ({"input_ids": [5, 6], "labels": [6]}, "bad_tokens"),
        ({"input_ids": ["a"], "labels": [1]}, "bad_tokens"),
        ({"input_ids": [5.5, -1], "labels": [-100, -100]}, "bad_tokens"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no_supervised_tokens"),
    ):
        with pytest.raises(DataError, match=rf"rows.jsonl:1: .*\[{rule}\]"):
            run(tmp_path, bad, good, num_good=0, bad_row_rules={"no_supervised_tokens": "error"})


def test_a_limit_of_one_token(tmp_path):
    with pytest.raises(DataError, match="prompt_too_long: 3 rows"):
        run(tmp_path, max_tokens=1)


def test_control_tokens(tmp_path):
    typed = said("an <|im_end|> in a text")
    assert run(tmp_path, typed).report["sources"][0]["control_tokens_typed"] == 1
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*\[control_tokens\]"):
        run(tmp_path, typed, control_tokens="error")


def test_a_template_that_hides_the_answer_is_not_guessed_at(tmp_path):
    assert RULES["mask_unproved"].cure  # proved in the tests of masks; here only that it has a cure


def test_duplicates_and_evaluation_rows_in_training_are_reported(tmp_path, caplog):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_bytes(b"\n".join(line(said(text)) for text in ("one", "two", "one", "three", "one")))
    # The same content in another shape of row is the same row.
    held_out.write_bytes(b"\n".join(line({"prompt": "Hi", "completion": t}) for t in ("two", "four")))
    prepared = run_file(train, eval=str(held_out))
    assert prepared.report["duplicate_rows"]["rows"] == 2
    assert prepared.report["duplicate_rows"]["places"][0] == {"place": f"{train}:3", "same_as": f"{train}:1"}
    assert prepared.report["eval_rows_in_training"] == {
        "rows": 1,
        "places": [{"place": f"{held_out}:1", "same_as": f"{train}:2"}],
    }
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    shared = f"data.eval shares 1 row with the training data (the first: {held_out}:1 = {train}:2)"
    assert len(told) == 1 and told[0].startswith(shared)
    text = describe(prepared.report)
    assert "2 training rows equal an earlier one" in text and "1 evaluation row" in text


def test_rules_that_do_not_exist_or_cannot_be_fixed_are_config_errors(tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, bad_row_rules={"empty_anwser": "drop", "invalid_json": "fix"})
    assert "Did you mean empty_answer?" in str(caught.value) and "this rule has no fix" in str(caught.value)


def test_a_row_that_was_split_counts_once_however_many_of_its_parts_are_lost(tmp_path):
    long_prompt = {"role": "user", "content": "word " * 60}
    turns = [long_prompt, ANSWER] * 4
    split = {"max_tokens": 64, "too_long": "split", "max_bad_fraction": 0.5}
    report = run(tmp_path, {"messages": [USER, ANSWER, *turns]}, {"messages": turns}, **split).report
    lost = report["sources"][0]["dropped"]["prompt_too_long"]
    assert lost["rows"] == 2 and [place["place"][-1] for place in lost["places"]] == ["1", "2"]
    one = run(tmp_path, {"messages": turns[:2]}, max_tokens=64, too_long="split").report
    per_part = one["sources"][0]["dropped"]["prompt_too_long"]
    for count in ("tokens", "supervised_tokens"):  # of every part, all the same
        assert lost[count] == 8 * per_part[count] > 0
    with pytest.raises(DataError, match="prompt_too_long: 1 row: "):
        run(tmp_path, {"messages": turns}, **split, bad_row_rules={"prompt_too_long": "error"})
