"""Template, tokens and mask in one process: Burnish, TRL and the tokenizer alone, in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from burnish.config.schema import DataConfig
from data_path.rows import MAX_TOKENS, TEMPLATE, as_messages, tokenizer_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 256


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


def masks(rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> Callable[[], list[Any]]:
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
        "masks": masks(rows, tokenizer),
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
