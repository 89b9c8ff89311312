"""Where the peers differ by design, each on one small example that their own code and ours work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parity_peers import job as ours
from parity_peers.job import Job, Row, read_rows, train_lines, view_ours, write_rows
from parity_peers.peers import Peer, Peers, openrlhf_case, trl_case

_QUESTION, _ANSWER = "What is in the river?", "water and time."
_HEADER = "{{ '<|im_start|>' + message['role'] + '\n' }}"
_MARKED = (
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ text + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if '</think>' in text and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    + _HEADER
    + _MARKED
)
"""ChatML that leaves the reasoning of earlier turns out, as the templates of reasoning models do."""
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""OpenRLHF's default `--data.input_template`, as a chat template."""


@dataclass(frozen=True)
class View:
    """What one side makes of the row."""

    who: str
    texts: list[str]
    learned: list[bool]


@dataclass(frozen=True)
class Example:
    """One row, and what every side makes of it."""

    key: str
    views: list[View]


@dataclass(frozen=True)
class _Question:
    """What to ask all sides: a row, the tokenizer, how each is set."""

    key: str
    row: Row
    tokenizer: Path
    max_tokens: int = 512
    openrlhf: Mapping[str, Any] | None = None
    """Its options; None where it has nothing to add."""
    openrlhf_row: Row | None = None
    """The row in its own columns, where they are others."""
    trl: Mapping[str, Any] | None = None


def token_examples(job: Job, peers: Peers, names: Sequence[Peer]) -> list[dict[str, Any]]:
    """Borders, templates, cuts, EOS, control tokens, defaults: tokens with marks, from the real code."""
    folder = job.folder / "examples"
    folder.mkdir(exist_ok=True)
    questions = _questions(job, folder)
    views: dict[str, list[View]] = {question.key: [_ours(question, folder)] for question in questions}
    for name in names:
        asked = [question for question in questions if _options(question, name) is not None]
        cases = [_case(question, name) for question in asked]
        for question, made in zip(asked, peers.examples(name, folder / f"{name}.json", cases), strict=True):
            if not made:
                raise RuntimeError(f"{name} drops the row of {question.key!r}")
            views[question.key].append(View(name, made[0]["texts"], made[0]["learned"]))
    return [asdict(Example(key, found)) for key, found in views.items()]


def _questions(job: Job, folder: Path) -> list[_Question]:
    chat = _chat(("user", _QUESTION), ("assistant", _ANSWER))
    plain = _tokenizer(job, folder / "plain", PLAIN)
    marked = {"assistant_only_loss": True}
    two_turns = _chat(
        ("user", _QUESTION),
        ("assistant", "<think>It is wet.</think>" + _ANSWER),
        ("user", "And more?"),
        ("assistant", "<think>So it is.</think>No more."),
    )
    typed = _chat(("user", "Why <|im_end|> there?"), ("assistant", "It is the end."))
    long = _chat(
        ("user", _QUESTION), ("assistant", "there is water, and there is time, and there is more of it.")
    )
    return [
        _Question(
            "border",
            chat,
            plain,
            openrlhf={
                "apply_chat_template": False,
                "input_key": "ask",
                "output_key": "say",
                "input_template": _TEMPLATE,
            },
            openrlhf_row={"ask": _QUESTION, "say": _ANSWER},
            trl=marked,
        ),
        _Question(
            "turns",
            two_turns,
            _tokenizer(job, folder / "turns", REASONING),
            openrlhf={"multiturn": True},
            trl=marked,
        ),
        _Question("cut", long, job.model, max_tokens=_prompt_length(job, long) + 6, openrlhf={}, trl=marked),
        _Question("eos", chat, _other_eos(job, folder / "eos"), openrlhf={}, trl=marked),
        _Question("control", typed, job.model, openrlhf={}, trl=marked),
        _Question("default", chat, job.model, trl={}),
    ]


_TEMPLATE = "User: {}\nAssistant: "


def _chat(*turns: tuple[str, str]) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _prompt_length(job: Job, chat: Row) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    text = tokenizer.apply_chat_template(chat["messages"][:-1], tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokenizer(job: Job, folder: Path, template: str) -> Path:
    """The model's tokenizer and config with another template."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    AutoConfig.from_pretrained(job.model).save_pretrained(folder)
    return folder


def _other_eos(job: Job, folder: Path) -> Path:
    """A tokenizer whose end of turn is not its EOS, as many base models have it."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]}
    )
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(job.model)
    config.vocab_size = len(tokenizer)
    config.save_pretrained(folder)
    return folder


def _ours(question: _Question, folder: Path) -> View:
    rows = write_rows(folder / f"{question.key}.jsonl", [question.row])
    config = {
        "model": {"path": str(question.tokenizer)},
        "data": {"train": str(rows), "max_tokens": question.max_tokens},
        "output_dir": str(folder / "unused"),
    }
    made = view_ours(config, folder / f"{question.key}.yaml", 1)[0]
    return View("Burnish", made["texts"], made["learned"])


def _options(question: _Question, name: Peer) -> Mapping[str, Any] | None:
    return question.openrlhf if name == "OpenRLHF" else question.trl


def _case(question: _Question, name: Peer) -> dict[str, Any]:
    options = dict(_options(question, name) or {})
    if name == "TRL":
        return trl_case(question.tokenizer, [question.row], question.max_tokens, **options)
    row = question.openrlhf_row or question.row
    return openrlhf_case(question.tokenizer, [row], question.max_tokens, **options)


# -- windows -------------------------------------------------------------------------------------------

NUM_ROWS, PER_STEP, NUM_EPOCHS = 9, 4, 2


def windows(job: Job, peers: Peers) -> dict[str, Any]:
    """Examples of each optimizer step over two epochs of 9 rows, 4 to a step: OpenRLHF's loop and ours."""
    folder = job.folder / "windows"
    folder.mkdir(exist_ok=True)
    rows = write_rows(folder / "rows.jsonl", read_rows(job.rows("mixed"))[:NUM_ROWS])
    config = ours.our_config(job, ours.PLAIN, folder / "ours")
    config["data"] = {"train": str(rows), "max_tokens": ours.MAX_TOKENS}
    config["batch"]["global_examples"] = PER_STEP
    config["train"]["epochs"] = NUM_EPOCHS
    steps = [line for line in train_lines(config, folder / "ours.yaml") if line["kind"] == "train"]
    made = peers.openrlhf_steps(job, rows, folder / "openrlhf", PER_STEP, NUM_EPOCHS)
    consumed = made["consumed"]
    num_steps = len(made["scalars"]["train/loss_mean"])
    epochs = [[k // NUM_ROWS for k in range(s * PER_STEP, (s + 1) * PER_STEP)] for s in range(num_steps)]
    return {
        "rows": NUM_ROWS,
        "per_step": PER_STEP,
        "epochs": NUM_EPOCHS,
        "burnish": [line["num_examples"] for line in steps],
        "openrlhf": [PER_STEP] * num_steps,
        "openrlhf_mixes_epochs": [s + 1 for s, of in enumerate(epochs) if len(set(of)) > 1],
        "openrlhf_never_learned": len(consumed) - num_steps * PER_STEP,
    }


# -- evaluation ----------------------------------------------------------------------------------------


def evaluation(job: Job, reported: Mapping[str, tuple[Path, float]]) -> list[dict[str, Any]]:
    """What each side reports of held-out rows, and the loss over all their learned tokens.

    Args:
        job: Has the rows.
        reported: By name: the weights after training, and the loss that was reported of them.
    """
    config = ours.our_config(job, ours.PLAIN, job.folder / "unused")
    config["data"] = {"train": str(job.evaluation), "max_tokens": ours.MAX_TOKENS}
    rows = view_ours(config, job.folder / "eval.yaml", ours.NUM_EVAL)
    found = []
    for who, (weights, loss) in reported.items():
        true = _token_mean(weights, rows)
        found.append({"who": who, "reported": loss, "over_all_tokens": true, "off_by": loss - true})
    return found


def _token_mean(weights: Path, rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean loss over every learned token of every row, each row alone through the model itself."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    total, num = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["ids"]])
        learned = torch.tensor(row["learned"])[1:]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total, num = total + float(losses[learned].double().sum()), num + int(learned.sum())
    return total / num


# -- the rate of the first steps -----------------------------------------------------------------------


def first_rates(num_steps: int, num_shown: int = 6) -> dict[str, list[float]]:
    """The share of the peak rate at the first steps: transformers' usual schedule, and ours."""
    import torch
    from transformers import get_scheduler

    from burnish.config.schema import OptimConfig, ScheduleConfig
    from burnish.plan import learning_rate

    warmup = round(ours.WARMUP_RATIO * num_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    settings = {"min_lr_rate": ours.MIN_LR_RATIO}
    schedule = get_scheduler(
        "cosine_with_min_lr", optimizer, warmup, num_steps, scheduler_specific_kwargs=settings
    )
    theirs = []
    for _ in range(num_shown):
        theirs.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    shape = ScheduleConfig(warmup_ratio=ours.WARMUP_RATIO, min_lr_ratio=ours.MIN_LR_RATIO)
    mine = [learning_rate(k, num_steps, OptimConfig(lr=1.0), shape) for k in range(1, num_shown + 1)]
    return {"burnish": mine, "cosine_with_min_lr": theirs}
