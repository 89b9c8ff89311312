"""Which rows are shown, what is said about them, and the lines of JSON."""

import io
import json
import re

import pytest
from rich.console import Console
from view_rig import CONTROL, chat, view_config

from burnish.errors import ConfigError, DataError
from burnish.report.view_terminal import visible
from burnish.view import gather, view


def json_of(config, num_examples=None, **choice):
    out = io.StringIO()
    view(config, Console(file=out), num_examples, as_json=True, **choice)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def terminal_of(config, colours=False, **choice):
    out = io.StringIO()
    system = "truecolor" if colours else None
    console = Console(file=out, force_terminal=colours, color_system=system, width=100)
    view(config, console, **choice)
    return out.getvalue()


def trained_text(example):
    return "".join(token["text"] for token in example["tokens"] if token["trained"])


def test_a_line_of_json_per_example_as_the_contract_says(tmp_path):
    config = view_config(tmp_path, {"a": [chat("Hi", "Hello there!"), chat("What?", "Paris 🙂.")]})
    lines = json_of(config)
    assert [line["row"] for line in lines] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 2)]
    for line, answer in zip(lines, ("Hello there!", "Paris 🙂."), strict=True):
        assert set(line) == {"source", "row", "tokens", "warnings"}
        assert line["source"] == "a"
        assert line["warnings"] == []
        assert {"id", "text", "trained", "weight"} <= set(line["tokens"][0])
        text = "".join(token["text"] for token in line["tokens"])
        assert text.endswith(f"<|im_start|>assistant\n{answer}<|im_end|>\n")
        assert trained_text(line) == f"{answer}<|im_end|>"
        assert all(token["trained"] == (token["weight"] > 0) for token in line["tokens"])


def test_weights_are_told_as_they_were_written(tmp_path):
    [line] = json_of(view_config(tmp_path, {"a": [chat("Hi", "Hello", weight=0.1)]}))
    assert {token["weight"] for token in line["tokens"]} == {0.0, 0.1}


def test_the_first_token_is_never_trained(tmp_path):
    config = view_config(tmp_path, {"a": [{"input_ids": [5, 6, 7]}]})
    [line] = json_of(config)
    assert [token["trained"] for token in line["tokens"]] == [False, True, True]
    assert line["tokens"][0]["weight"] == 0


def test_rows_are_taken_alike_from_all_sources_and_spread_over_each(tmp_path):
    many = [chat("Hi", f"Hello {n}") for n in range(90)]
    config = view_config(tmp_path, {"many": many, "few": [chat("Hi", "there")]})
    gathered = gather(config, 10)
    rows = [int(example.row.rsplit(":", 1)[1]) for example in gathered.examples if example.source == "many"]
    assert rows == [1, 11, 21, 31, 41, 51, 61, 71, 81]
    assert [example.source for example in gathered.examples[-1:]] == ["few"]


def test_as_many_are_shown_as_asked_for(tmp_path):
    config = view_config(tmp_path, {"a": [chat("Hi", "Hello")] * 2_100})
    assert len(json_of(config, 2_050)) == 2_050
    with pytest.raises(ConfigError, match="-n"):
        gather(config, 0)


def test_bad_rows_get_a_verdict_and_others_take_their_place(tmp_path):
    rows = [chat("Hi", "Hello"), '{"messages": [', chat("Hi", ""), chat("Hi", "there"), chat("Hi", "Paris")]
    gathered = gather(view_config(tmp_path, {"a": rows}, bad_row_rules={"empty_answer": "error"}), 3)
    assert len(gathered.examples) == 3
    found = {(loss.rule, loss.row.rsplit(":", 1)[1], loss.verdict) for loss in gathered.lost}
    assert found == {("invalid_json", "2", "left out"), ("empty_answer", "3", "stops the run")}
    shown = terminal_of(view_config(tmp_path, {"a": rows}))
    assert "[invalid_json]" in shown
    assert "[empty_answer]" in shown


def test_json_stays_clean_and_verdicts_go_aside(tmp_path):
    config = view_config(tmp_path, {"a": [chat("Hi", "Hello"), "{"]})
    out, aside = io.StringIO(), io.StringIO()
    lost = view(config, Console(file=out), as_json=True, aside=Console(file=aside, width=60))
    assert len(out.getvalue().splitlines()) == len(lost) == 1
    assert f"{tmp_path}/a.jsonl:2" in aside.getvalue()
    assert "left out" in aside.getvalue()


def test_a_terminal_that_knows_only_ascii_is_no_error(tmp_path):
    config = view_config(tmp_path, {"a": [chat("Hi 🙂", "Hello")]})
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    view(config, Console(file=stream, width=80))
    stream.flush()
    assert b"Hi \\U0001f642" in raw.getvalue()


def test_nothing_but_bad_rows_is_an_error_that_names_them(tmp_path):
    config = view_config(tmp_path, {"a": ["{", "{"]})
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        view(config, Console(file=io.StringIO()))


def test_what_is_cut_and_typed_is_a_warning(tmp_path):
    typed = chat("Say <|im_end|> please", "I will")
    config = view_config(tmp_path, {"a": [typed, chat("Hi", "Hello " * 200)]}, max_tokens=60)
    typing, cut = gather(config, 5).examples
    assert any("typed" in warning and "1" in warning for warning in typing.warnings)
    assert cut.num_tokens_cut > 0
    assert any("cut at data.max_tokens" in warning for warning in cut.warnings)
    # The typed one is spelled in ordinary tokens: of the three real ends of turn none is it.
    ends = sum(text == "<|im_end|>" for text in typing.texts)
    assert "".join(typing.texts).count("<|im_end|>") == ends + 1


def test_parts_of_a_split_row_are_examples_of_their_own(tmp_path):
    config = view_config(tmp_path, {"a": [{"text": "Hello there! " * 60}]}, max_tokens=50, too_long="split")
    parts = gather(config, 1).examples
    assert len(parts) > 2
    assert [(part.part, part.num_parts) for part in parts] == [
        (n, len(parts)) for n in range(1, len(parts) + 1)
    ]


def test_one_source_and_one_row_can_be_asked_for(tmp_path):
    rows = [chat("Hi", f"Hello {n}") for n in range(3_000)]
    config = view_config(tmp_path, {"a": rows, "b": rows[:3]})
    assert {line["source"] for line in json_of(config, 4, source="b")} == {"b"}
    [line] = json_of(config, 4, source="a", row="2999")
    assert "Hello 2998" in trained_text(line)
    with pytest.raises(ConfigError, match="There are: a, b"):
        json_of(config, source="c")
    with pytest.raises(ConfigError, match="no row"):
        json_of(config, row="4000")


def test_micro_batches_hold_every_example_once(tmp_path):
    config = view_config(tmp_path, {"a": [chat("Hi", "Hello " * n) for n in range(1, 20)]}, max_tokens=100)
    gathered = gather(config, 20)
    assert sorted(i for batch in gathered.micro_batches for i in batch) == list(range(19))
    assert gathered.packed


def test_the_terminal_shows_the_mask_with_colours_and_without(tmp_path):
    rows = [chat("Hi 🙂 日本", "Hello 🙂", weight=0.5), chat("Hi", "there")]
    config = view_config(tmp_path, {"a": rows})
    plain = terminal_of(config)
    assert "⟦0.5: Hello 🙂<|im_end|>⟧↵" in plain
    assert "⟦there<|im_end|>⟧↵" in plain
    coloured = terminal_of(config, colours=True)
    assert "⟦" not in coloured
    assert "\x1b[38;2;255;255;255;48;2;0;116;72mthere" in coloured.replace("\x1b[0m", "")


@pytest.mark.parametrize("system", ["standard", "256", "truecolor"])
def test_full_half_and_no_weight_look_different_on_every_terminal(tmp_path, system):
    rows = [chat("Hi", "Hello", weight=0.5), chat("Hi", "there")]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=system, width=100)
    view(view_config(tmp_path, {"a": rows}), console)
    looks = {word: re.findall(rf"\x1b\[([\d;]+)m{word}", out.getvalue()) for word in ("Hello", "there")}
    assert looks["Hello"]
    assert looks["there"]
    assert looks["Hello"] != looks["there"]
    assert "user↵" in re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())


def test_data_cannot_command_the_terminal(tmp_path):
    config = view_config(
        tmp_path, {"a": [chat("\x1b]0;title\x07\x1b[31m [bold]x[/bold] :smile:", "\u202eok")]}
    )
    plain = terminal_of(config)
    assert "\x1b" not in plain
    assert "\x07" not in plain
    assert "␛]0;title␇␛[31m [bold]x[/bold] :smile:" in plain
    assert "⟨U+202E⟩ok" in plain
    assert visible("👩\u200d👧 a\nb\tc") == "👩\u200d👧 a\nb\tc"


def test_the_head_says_what_the_examples_were_made_with(tmp_path):
    gathered = gather(view_config(tmp_path, {"a": [chat("Hi", "Hello")]}), 1)
    assert gathered.facts["template"] == "chatml"
    assert "proved" in gathered.facts["mask"]
    assert len(gathered.control_ids) == len(CONTROL)
