"""How fast data is prepared and planned, and how well it is packed.

    python bench/data.py --quick                          # a minute; rows made on the spot
    python bench/data.py --data alpaca.json --tokenizer FOLDER --out bench/results/data.json

Preparing: examples per second of template + tokens + mask in one process and one thread, Burnish against
TRL's own preparation (`SFTTrainer`, `assistant_only_loss`, a `{% generation %}` template) and against
`tokenizer(batch)` on texts already rendered, the limit for anything that tokenises. All three take turns,
round by round, on the same rows; ratios are taken within a round. Ours and TRL's token ids and masks are
compared before anything is timed.

Planning: order, windows, packing counts and balance of 10 million examples, in a process of its own, so
that its peak memory is known.

Packing: windows of real lengths over 8 ranks: how often the number of micro-batches is the least possible,
and how much longer the slowest rank takes than the mean.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.config.schema import BatchConfig, DataConfig, TrainConfig
from burnish.data.count import count_windows
from burnish.data.pack import imbalance, least_micro_batches, pack_window
from burnish.data.windows import plan_windows
from burnish.plan import CostModel, MicroBudget

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with marks, which TRL needs. Burnish uses the same."""
MAX_TOKENS = 4096
BATCH_ROWS = 256
NUM_RANKS = 8
PLANNED_EXAMPLES = 10_000_000
TARGETS = {
    "over_trl": 3.0,
    "of_limit": 0.6,
    "planning_seconds": 30.0,
    "planning_peak_bytes": 1 << 30,
    "least_share": 0.99,
    "imbalance": 0.02,
}


# -- rows ----------------------------------------------------------------------------------------------

_VERBS = ("Describe", "Explain", "List", "Compare", "Summarise", "Rewrite", "Classify", "Translate")
_NOUNS = ("river", "engine", "market", "garden", "theory", "bridge", "recipe", "planet", "library", "story")
_TEXT = (
    "the of and a to in is that it was for on are with as his they be at one have this from or had by hot "
    "word but what some we can out other were all there when up use your how said an each she which their "
    "time will way about many then them write would like so these her long make thing see him two has look "
    "more day could go come did number sound no most people my over know water than call first who may down"
)
_WORDS = _TEXT.split()


def made_up_rows(num: int) -> list[dict[str, str]]:
    """Rows in Alpaca's format, with answers of about its lengths (log-normal, mean near 100 words)."""
    rng = random.Random(0)
    rows = []
    for i in range(num):
        size = min(700, max(3, int(rng.lognormvariate(4.3, 0.8))))
        words = [rng.choice(_WORDS) if rng.random() < 0.85 else f"{rng.choice(_NOUNS)}s" for _ in range(size)]
        for stop in range(11, size, 12):
            words[stop] += "."
        ask = f"{rng.choice(_VERBS)} a {rng.choice(_NOUNS)} for a {rng.choice(_NOUNS)} in {i} words."
        given = " ".join(rng.choices(_WORDS, k=20)) if rng.random() < 0.4 else ""
        rows.append({"instruction": ask, "input": given, "output": " ".join(words).capitalize() + "."})
    return rows


def read_rows(path: str | None, num: int) -> list[dict[str, str]]:
    """An Alpaca file's rows (JSON or JSON lines), repeated to `num`; made-up ones without a file."""
    if path is None:
        return made_up_rows(num)
    text = Path(path).read_text("utf-8")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = [row for row in rows if row["instruction"] and row["output"]]
    return list(itertools.islice(itertools.cycle(rows), num))


def tokenizer_for(folder: str | None, rows: Sequence[Mapping[str, str]]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder with ChatML's two tokens added, or a byte-level BPE made from the rows."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    control = ["<|im_start|>", "<|im_end|>"]
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator([row["output"] for row in rows[:2000]], trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def as_messages(row: Mapping[str, str]) -> list[dict[str, str]]:
    """A row as the two messages that Burnish makes of it."""
    ask = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": row["output"]}]


# -- preparing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestants:
    """What takes turns. Each prepares all rows; `first` gives some of its token ids and masks."""

    run: Mapping[str, Callable[[], object]]
    num_rows: int


def _ours(rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> Callable[[], list[Any]]:
    """Rows to Arrow batches: format, template, tokens, mask, hashes, as `prepare` has it done."""
    from burnish.data.encode import BatchEncoder
    from burnish.data.format import RowFormat
    from burnish.data.mask import Encoder
    from burnish.data.policies import resolve_policies
    from burnish.data.rows import Row

    data = DataConfig.model_validate({"train": "rows", "max_tokens": MAX_TOKENS})
    columns = {name: name for name in ("instruction", "input", "output")}
    encoder = Encoder(tokenizer, TEMPLATE, data)
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    work = BatchEncoder(encoder, backend, RowFormat("alpaca", columns), resolve_policies(data))
    given = [Row("rows", f"rows:{i}", row, None) for i, row in enumerate(rows)]
    return lambda: [work(given[i : i + BATCH_ROWS]) for i in range(0, len(given), BATCH_ROWS)]


def _masks(rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> Callable[[], list[Any]]:
    """Template, tokens and mask alone: conversations to examples."""
    from burnish.data.mask import Encoder
    from burnish.records import Conversation, Message

    encoder = Encoder(
        tokenizer, TEMPLATE, DataConfig.model_validate({"train": "x", "max_tokens": MAX_TOKENS})
    )
    given = [
        Conversation(
            "rows", f"rows:{i}", messages=[Message(m["role"], m["content"]) for m in as_messages(row)]
        )
        for i, row in enumerate(rows)
    ]
    return lambda: [encoder.encode(given[i : i + BATCH_ROWS]) for i in range(0, len(given), BATCH_ROWS)]


def _trl(rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> Callable[[], Any]:
    """TRL's own preparation of a data set in memory: no file is read or written, which favours it."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    args = SFTConfig(
        "build/bench-trl",
        assistant_only_loss=True,
        max_length=MAX_TOKENS,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    messages = datasets.Dataset.from_list([{"messages": as_messages(row)} for row in rows])
    few = messages.select(range(2))
    trainer = SFTTrainer(model, args, train_dataset=few, processing_class=tokenizer)
    return lambda: trainer._prepare_dataset(messages, tokenizer, args, False, None, "train")


def _limit(rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> Callable[[], list[Any]]:
    texts = [str(tokenizer.apply_chat_template(as_messages(row), tokenize=False)) for row in rows]
    batches = [texts[i : i + BATCH_ROWS] for i in range(0, len(texts), BATCH_ROWS)]
    return lambda: [tokenizer(batch, add_special_tokens=False) for batch in batches]


def check_parity(ours: Sequence[Any], trl: Any) -> int:
    """Compare token ids and masks of both; returns how many tokens were compared.

    Raises:
        AssertionError: They differ, so comparing speeds would say nothing.
    """
    num_tokens = 0
    for theirs, ids, weights in zip(trl, _column(ours, "token_ids"), _column(ours, "weights"), strict=True):
        masked = [t if w > 0 else -100 for t, w in zip(ids, weights, strict=True)]
        assert ids == theirs["input_ids"] and masked == theirs["labels"], (ids, theirs)
        num_tokens += len(ids)
    return num_tokens


def _column(batches: Sequence[Any], name: str) -> Iterator[list[Any]]:
    for batch in batches:
        yield from batch.tokens.column(name).to_pylist()


def bench_preparing(rows: list[dict[str, str]], folder: str | None, num_rounds: int) -> dict[str, Any]:
    """Examples per second of all three, and the ratios."""
    tokenizer = tokenizer_for(folder, rows)
    few = rows[:1000]
    num_tokens = check_parity(_ours(few, tokenizer)(), _trl(few, tokenizer)())
    run = {
        "burnish": _ours(rows, tokenizer),
        "masks": _masks(rows, tokenizer),
        "trl": _trl(rows, tokenizer),
        "limit": _limit(rows, tokenizer),
    }
    wall: dict[str, list[float]] = {name: [] for name in run}
    cpu: dict[str, list[float]] = {name: [] for name in run}
    names = list(run)
    for round_ in range(num_rounds):
        # Another order every round, so that none always follows the same one.
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            gc.collect()
            start, start_cpu = time.perf_counter(), time.process_time()
            run[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return {
        "rows": len(rows),
        "rounds": num_rounds,
        "vocabulary": len(tokenizer),
        "tokens_compared_with_trl": num_tokens,
        "examples_per_second": {n: _spread([len(rows) / s for s in wall[n]]) for n in names},
        "examples_per_cpu_second": {n: _spread([len(rows) / s for s in cpu[n]]) for n in names},
        "masks_over_trl": _ratios(wall, "trl", "masks"),
        "masks_of_limit": _ratios(wall, "limit", "masks"),
        "over_trl": _ratios(wall, "trl", "burnish"),
        "of_limit": _ratios(wall, "limit", "burnish"),
        "over_trl_cpu": _ratios(cpu, "trl", "burnish"),
        "of_limit_cpu": _ratios(cpu, "limit", "burnish"),
    }


def _ratios(seconds: Mapping[str, Sequence[float]], slower: str, faster: str) -> dict[str, float]:
    return _spread([a / b for a, b in zip(seconds[slower], seconds[faster], strict=True)])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# -- planning ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """The numbers that windows are planned from."""

    num_tokens: np.ndarray
    total_weight: np.ndarray
    num_supervised: np.ndarray
    source_ids: np.ndarray
    source_names: tuple[str, ...] = ("a", "b")


def bench_planning(num: int) -> dict[str, Any]:
    """Plan `num` examples of two sources in this process; seconds by part, and its peak memory."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.3, 0.9, num), 2, MAX_TOKENS).astype(np.int64)
    counts = Counts(
        lengths, lengths * 0.8, (lengths * 0.8).astype(np.int64), (np.arange(num) % 10 == 0).astype(np.int32)
    )
    before = _peak_bytes()
    sources = [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]
    data = DataConfig.model_validate({"train": sources, "mix": "weighted", "max_tokens": MAX_TOKENS})
    batch = BatchConfig(global_examples=NUM_RANKS * 256, micro_tokens=16384)
    start = time.perf_counter()
    start_cpu = time.process_time()
    windows = plan_windows(counts, data, batch, TrainConfig(), NUM_RANKS, packed=True)
    windows.epoch_order(0)
    ordered = time.perf_counter()
    found = count_windows(windows, counts)
    counted = time.perf_counter()
    cpu_seconds = time.process_time() - start_cpu
    sample = np.linspace(1, windows.num_steps, 200).astype(int).tolist()
    for step in sample:
        windows.window(step)
    return {
        "examples": num,
        "steps": windows.num_steps,
        "order_and_windows_seconds": ordered - start,
        "packing_and_balance_seconds": counted - ordered,
        "seconds": counted - start,
        "cpu_seconds": cpu_seconds,
        "one_window_seconds": (time.perf_counter() - counted) / len(sample),
        "peak_bytes": _peak_bytes(),
        "peak_bytes_before": before,
        "least_share": found.least_micro_batches_share,
        "imbalance_mean": found.imbalance_mean,
        "imbalance_max": found.imbalance_max,
    }


def _peak_bytes() -> int:
    """Most memory that this process has had in use."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be the parent's where that was larger
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def planning_apart(num: int) -> dict[str, Any]:
    """`bench_planning` in a fresh process, whose peak memory is nobody else's."""
    command = [sys.executable, __file__, "--planning-only", str(num)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# -- packing -------------------------------------------------------------------------------------------


def bench_packing(rows: Sequence[Mapping[str, str]], folder: str | None) -> dict[str, Any]:
    """How windows of these rows are packed over 8 ranks, for several sizes of window and forward."""
    tokenizer = tokenizer_for(folder, rows)
    distinct = list({json.dumps(row): row for row in rows}.values())
    texts = [str(tokenizer.apply_chat_template(as_messages(row), tokenize=False)) for row in distinct]
    sizes = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]  # type: ignore
    lengths = np.minimum(np.array(sizes, np.int64), MAX_TOKENS)
    found = {}
    for per_window, micro_tokens in ((256, 4096), (256, 8192), (NUM_RANKS * 256, 8192)):
        found[f"{per_window} examples, {micro_tokens} tokens"] = _pack_many(lengths, per_window, micro_tokens)
    return {"distinct_rows": len(distinct), "mean_tokens": float(lengths.mean()), "windows": found}


def _pack_many(lengths: np.ndarray, per_window: int, micro_tokens: int, num: int = 200) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    budget, cost = MicroBudget(micro_tokens, None), CostModel()
    excess, extra, fill = [], [], []
    for _ in range(num):
        window = rng.choice(lengths, per_window, replace=True)
        cuts = pack_window(window, NUM_RANKS, budget, cost)
        excess.append(imbalance(window, cuts, cost))
        extra.append(len(cuts[0]) - least_micro_batches(window, NUM_RANKS, budget))
        fill.append(window.sum() / (NUM_RANKS * len(cuts[0]) * micro_tokens))
    return {
        "windows": num,
        "least_share": extra.count(0) / num,
        "most_extra": max(extra),
        "imbalance_mean": float(np.mean(excess)),
        "imbalance_max": float(np.max(excess)),
        "fill": float(np.mean(fill)),
    }


# -- all of it -----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers were measured on, without naming it."""
    packages = ("burnish", "tokenizers", "transformers", "trl", "datasets", "numpy", "pyarrow")
    return {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "packages": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def verdicts(found: Mapping[str, Any]) -> dict[str, bool]:
    """Each target, and whether it was met."""
    met: dict[str, bool] = {}
    if "preparing" in found:
        # Template, tokens and mask, as the targets are worded; with checks, hashes and Arrow it is less.
        found_here = found["preparing"]
        met["at least 3 times TRL"] = found_here["masks_over_trl"]["median"] >= TARGETS["over_trl"]
        met["at least 60 % of the limit"] = found_here["masks_of_limit"]["median"] >= TARGETS["of_limit"]
    if "planning" in found:
        # One thread: its CPU time is the wall time of a machine that nobody else uses.
        met["planned within 30 s (CPU)"] = found["planning"]["cpu_seconds"] < TARGETS["planning_seconds"]
        met["planned within 1 GiB"] = found["planning"]["peak_bytes"] < TARGETS["planning_peak_bytes"]
    if "packing" in found:
        windows = list(found["packing"]["windows"].values())
        met["least micro-batches in 99 %"] = min(w["least_share"] for w in windows) >= TARGETS["least_share"]
        met["never more than one above"] = max(w["most_extra"] for w in windows) <= 1
        met["imbalance under 2 %"] = max(w["imbalance_mean"] for w in windows) < TARGETS["imbalance"]
    return met


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--quick", action="store_true", help="few rows and rounds: does it work, about how fast"
    )
    parser.add_argument("--data", help="an Alpaca file, JSON or JSON lines; default: rows made on the spot")
    parser.add_argument("--tokenizer", help="folder of a fast tokenizer; default: one made from the rows")
    parser.add_argument("--rows", type=int, default=50_000, help="repeat the file to so many rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("preparing", "planning", "packing"))
    parser.add_argument("--out", type=Path, help="write all numbers there as JSON")
    parser.add_argument("--planning-only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.planning_only:
        print(json.dumps(bench_planning(args.planning_only)))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for everyone
    num_rows, num_planned = (2000, 1_000_000) if args.quick else (args.rows, PLANNED_EXAMPLES)
    rows = read_rows(args.data, num_rows)
    found: dict[str, Any] = {"machine": machine(), "data": "file" if args.data else "made up"}
    parts: dict[str, Callable[[], Any]] = {
        "preparing": lambda: bench_preparing(rows, args.tokenizer, args.rounds),
        "planning": lambda: planning_apart(num_planned),
        "packing": lambda: bench_packing(rows, args.tokenizer),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            found[name] = part()
            print(json.dumps({name: found[name]}, indent=1), flush=True)
    found["targets_met"] = verdicts(found)
    for what, met in found["targets_met"].items():
        print(f"{'met ' if met else 'MISS'} {what}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
