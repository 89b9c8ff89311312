"""The recipes of docs/data.md: plain text, reasoning, tool calls. Their configs, on made-up rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from burnish.config.load import load_config
from burnish.config.plan_options import PlanOptions
from burnish.config.schema import Config
from burnish.export import merge
from burnish.preview import check_data, plan_run
from burnish.run import train
from burnish.scoring import score
from burnish.talk import Speaker
from burnish.view import view
from cluster.tiny_job import write_tiny_job

EXAMPLES = Path(__file__).parents[2] / "examples"
END = "<|im_end|>"

REASONING_TEMPLATE = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set thought = m.reasoning_content | default('', true) -%}{%- set said = m.content -%}
{%- if not thought and '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() -%}
{%- set said = said.split('</think>')[-1].lstrip() -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last and thought -%}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- said + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

SEARCH = {
    "name": "search",
    "description": "Look something up",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
}
CALL = {"name": "search", "arguments": {"query": "moons of Mars"}}


def recipe(name: str, folder: Path, rows: list[dict[str, Any]], *flags: str) -> Config:
    """An example's config on a tiny model and made-up rows."""
    write_tiny_job(folder)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {
        "model.path": folder / "model", "model.init": "random", "model.dtype": "fp32", "data.train": data,
        "data.eval_fraction": 0.0, "eval.every_steps": "null", "data.cache_dir": folder / "cache",
        "data.num_workers": 1, "train.max_steps": 2, "checkpoint.resume": "never", "log.trackers": "[]",
        "output_dir": folder / "run",
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in small.items()]
    return load_config(EXAMPLES / name, [*arguments, *flags])


def seen(config: Config, num: int = 100) -> list[dict[str, Any]]:
    """What `burnish view --json` prints."""
    out = io.StringIO()
    view(config, Console(file=out), num, as_json=True)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def learned(example: dict[str, Any]) -> list[str]:
    """Runs of tokens that are trained, as text."""
    runs: list[str] = []
    before = False
    for token in example["tokens"]:
        if token["trained"]:
            runs = [*runs[:-1], runs[-1] + token["text"]] if before else [*runs, token["text"]]
        before = token["trained"]
    return runs


def trains(config: Config) -> Path:
    """Check, plan and train say the same, and the result loads."""
    report, _ = check_data(config)
    assert report["totals"]["examples"] > 0
    plan = plan_run(config, PlanOptions(gpus=1))
    result = train(config)
    lines = [json.loads(line) for line in (result.parent / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 2 and all(step["loss"] > 0 for step in steps)
    assert plan.counts.num_supervised_tokens == sum(step["num_supervised_tokens"] for step in steps)
    model = AutoModelForCausalLM.from_pretrained(result)
    assert model.num_parameters() == plan.num_params
    # vLLM's rules: a row for every token, and as many rows as config.json says.
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == model.config.vocab_size >= len(AutoTokenizer.from_pretrained(result))
    return result


def test_plain_text(tmp_path):
    texts = [f"Page {i}. " + "All moons turn. " * (3 + 9 * i) for i in range(4)]
    flags = ["--data.max_tokens=64", "--batch.global_tokens=256"]
    config = recipe("continue.yaml", tmp_path, [{"text": text} for text in texts], *flags)
    pieces = seen(config)
    rows: dict[str, list[dict[str, Any]]] = {}
    for piece in pieces:
        assert len(piece["tokens"]) <= 64
        # A piece's first token is context, or the first of all; every other one is learned.
        assert [token["trained"] for token in piece["tokens"]] == [False] + [True] * (
            len(piece["tokens"]) - 1
        )
        rows.setdefault(piece["row"], []).append(piece)
    for text, parts in zip(texts, rows.values(), strict=True):
        texts_of_tokens = [[token["text"] for token in part["tokens"]] for part in parts]
        tokens = texts_of_tokens[0]
        for piece in texts_of_tokens[1:]:
            assert piece[0] == tokens[-1], "a piece begins with the last token of the one before"
            tokens = tokens + piece[1:]
        assert "".join(tokens) == text + END, "each text whole, and one EOS at its end"
    trains(config)


@pytest.mark.parametrize("brings", [False, True])
def test_a_text_has_one_bos_and_one_eos(tmp_path, brings):
    """Whether the tokenizer puts the BOS or the text brings both."""
    text = "<|im_start|>Moons turn.<|im_end|>" if brings else "Moons turn."
    flags = ["--data.control_tokens=allow", "--data.max_tokens=64", "--batch.global_tokens=64"]
    config = recipe("continue.yaml", tmp_path, [{"text": text}], *flags)
    file = tmp_path / "model/tokenizer.json"
    described = json.loads(file.read_text())
    bos = next(t["id"] for t in described["added_tokens"] if t["content"] == "<|im_start|>")
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [bos], "tokens": ["<|im_start|>"]}},
    }
    file.write_text(json.dumps(described))
    (example,) = seen(config)
    assert [token["text"] for token in example["tokens"]].count("<|im_start|>") == 1
    assert "".join(token["text"] for token in example["tokens"]) == "<|im_start|>Moons turn.<|im_end|>"
    assert learned(example) == ["Moons turn.<|im_end|>"]


def test_reasoning(tmp_path):
    asked, again = {"role": "user", "content": "2+3?"}, {"role": "user", "content": "And 4 more?"}
    rows: list[dict[str, Any]] = []
    for i in range(8):
        first = {"role": "assistant", "content": "5.", "reasoning_content": "Two and three."}
        apart = {"role": "assistant", "content": f"{9 + i}.", "reasoning_content": f"Five and {4 + i}."}
        inline = {"role": "assistant", "content": f"<think>\nFive and {4 + i}.\n</think>\n\n{9 + i}."}
        rows += [{"messages": [asked, first, again, last]} for last in (apart, inline)]
    flags = ["--data.max_tokens=256", "--batch.global_examples=4", "--batch.micro_tokens=512"]
    tokens = "--model.add_tokens={<think>: ordinary, </think>: ordinary}"
    config = recipe("reasoning.yaml", tmp_path, rows, *flags, tokens)
    (tmp_path / "think.jinja").write_text(REASONING_TEMPLATE)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"chat_template": str(tmp_path / "think.jinja")})}
    )
    examples = seen(config)
    assert len(examples) == 16
    for i, example in enumerate(examples):
        expected = f"<think>\nFive and {4 + i // 2}.\n</think>\n\n{9 + i // 2}.{END}"
        assert learned(example) == [expected], "reasoning and answer of the last turn, and its end"
        texts = [token["text"] for token in example["tokens"]]
        assert texts.count("<think>") == texts.count("</think>") == 1
    every = config.model_copy(update={"data": config.data.model_copy(update={"train_on": "assistant"})})
    assert learned(seen(every)[0]) == [f"5.{END}", f"<think>\nFive and 4.\n</think>\n\n9.{END}"]
    final = trains(config)
    assert (
        AutoTokenizer.from_pretrained(final).decode([259, 260], skip_special_tokens=True) == "<think></think>"
    )


@pytest.mark.parametrize("shape", ["sharegpt", "messages"])
def test_tool_calls(tmp_path, shape):
    result, answer = '{"moons": ["Phobos", "Deimos"]}', "Phobos and Deimos. <|im_end|> is how turns end."
    turns = [
        ("human", "Which moons?"),
        ("function_call", json.dumps(CALL)),
        ("observation", result),
        ("gpt", answer),
    ]
    row: dict[str, Any] = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "tools": json.dumps([SEARCH]),
    }
    if shape == "messages":
        call = {"id": "c1", "type": "function", "function": CALL}
        row = {
            "messages": [
                {"role": "user", "content": "Which moons?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": result, "tool_call_id": "c1"},
                {"role": "assistant", "content": answer},
            ],
            "tools": [{"type": "function", "function": SEARCH}],
        }
    flags = ["--data.max_tokens=2048", "--batch.global_examples=4", "--data.chat_template=chatml"]
    tokens = "--model.add_tokens={<tool_call>: ordinary, </tool_call>: ordinary}"
    config = recipe("tools.yaml", tmp_path, [row] * 8, *flags, "--adapter.rank=2", tokens)
    example = seen(config, 1)[0]
    call, final = learned(example)
    assert call == f"\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>{END}"
    assert final == answer + END
    texts = [token["text"] for token in example["tokens"]]
    assert texts.count(END) == 5, "one a turn, of which the tools are the first; the typed one is text"
    assert texts.count("<tool_call>") == 3, "twice where it says how to call, and once in the call"
    out = train(config)
    assert json.loads((out / "adapter_config.json").read_text())["trainable_token_indices"]
    if shape == "messages":
        merge(out, tmp_path / "merged", "fp32")
        losses = [
            json.loads(score([str(path)], [str(tmp_path / "rows.jsonl")], True))["loss"]
            for path in (out, tmp_path / "merged")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert len(Speaker(str(out), 4).answer([[{"role": "user", "content": "Which moons?"}]])) == 1


def test_new_tokens_in_use(tmp_path):
    """An ordinary word is one token where it is typed; a special one typed is escaped like any other."""
    rows = [{"text": "5 kWh cost <|fee|> 2."}] * 8
    flags = ["--data.max_tokens=64", "--batch.global_tokens=64", "--model.pad_vocab_multiple=64"]
    config = recipe(
        "continue.yaml", tmp_path, rows, *flags, "--model.add_tokens={kWh: ordinary, <|fee|>: special}"
    )
    texts = [token["text"] for token in seen(config)[0]["tokens"]]
    assert texts.count("kWh") == 1 and "<|fee|>" not in texts
    final = trains(config)
    tokenizer = AutoTokenizer.from_pretrained(final)
    ids = tokenizer.convert_tokens_to_ids(["kWh", "<|fee|>"])
    assert ids == [259, 260] and tokenizer.decode(ids, skip_special_tokens=True) == "kWh"
    assert AutoModelForCausalLM.from_pretrained(final).config.vocab_size == 320
