"""From the config's sources to examples that every rank can map: load, format, encode, keep.

Every source becomes a part of its own in the cache, so another blend, or one more source, prepares
only what is new. The training and evaluation stores are choices out of the parts.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from burnish.config.row_rules import RULES
from burnish.config.schema import Config, DataConfig, SourceConfig
from burnish.data.cache import (
    FORMAT_VERSION,
    commit,
    digest_of,
    mark_used,
    one_at_a_time,
    open_cache,
    read_summary,
    staging,
)
from burnish.data.encode import BatchEncoder
from burnish.data.forecast import forecast_packing
from burnish.data.format import RowFormat, detect_format
from burnish.data.holdout import split_off
from burnish.data.load import FileFacts, Row, expand_source, file_facts, read_rows, source_names
from burnish.data.mask import Encoder
from burnish.data.parallel import map_in_order
from burnish.data.policies import resolve_policies
from burnish.data.problems import shorten
from burnish.data.progress import progress
from burnish.data.report import bad_fraction_problem, build_report
from burnish.data.stamp import date_of_run, stamps_dates
from burnish.data.store import ExampleStore, Part, PartWriter
from burnish.data.tally import NUM_SHOWN, Tally, rows_error
from burnish.errors import DataError, Problem, counted
from burnish.runtime import available_cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("burnish")

CACHE_NAME = ".burnish-cache"
BATCH_ROWS = 256
"""Rows per call of the encoder, and per message to a worker."""
PEEK_ROWS = 200
"""Rows that are looked at to find a source's format."""
WORKER_BYTES = 16 << 20
"""A source below this size is prepared sooner than worker processes have started."""
LIBRARIES = ("tokenizers", "transformers", "jinja2")
"""Libraries whose version may change tokens or text."""


@dataclass(frozen=True)
class PreparedData:
    """Everything about the data that training needs."""

    train: ExampleStore
    eval: ExampleStore | None
    report: dict[str, Any]
    """What `data_report.json` holds."""
    fingerprint: str
    """Hash of every token and weight of `data.train`, and of which of its examples are trained on: equal
    data, equal hash. `data.eval` is no part of it."""


@dataclass(frozen=True)
class SourceFiles:
    """A source, and what it is on disk right now."""

    name: str
    use: str
    """`train` or `eval`."""
    source: SourceConfig
    files: Sequence[Path]
    facts: Sequence[FileFacts]

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(fact.num_bytes for fact in self.facts)

    @property
    def num_rows(self) -> int | None:
        """About how many rows will be read; None where nobody knows."""
        counts = [fact.num_rows for fact in self.facts]
        known = sum(count or 0 for count in counts)
        most = self.source.max_examples
        if None in counts:
            return None
        return known if most is None else min(known, most)


@dataclass(frozen=True)
class PreparedPart:
    """One source's part: where it lies, and what its summary says."""

    origin: SourceFiles
    folder: Path
    summary: Mapping[str, Any]


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreparedData:
    """Prepare all data of a run, or find it prepared.

    Args:
        config: `data` says what; `train.seed` chooses held-out rows; `output_dir` places the cache.
        tokenizer: A fast tokenizer.
        template: The chat template's text, if there is one.

    Raises:
        ConfigError: `data.bad_row_rules` names no rule.
        DataError: Files or rows are bad and the policy is not to go on without them, or nothing is
            left to train on. All bad rows of all sources are reported at once.
        MachineError: The cache cannot be written, or a worker was killed.
    """
    data = config.data
    kitchen = _Kitchen(config, tokenizer, template)
    origins = [*_find_files("train", data.train), *_find_files("eval", data.eval or ())]
    open_cache(kitchen.cache)
    results = [kitchen.part(origin) for origin in origins]
    bad_rows = rows_error([result for result in results if isinstance(result, Tally)])
    if bad_rows is not None:
        raise bad_rows
    parts = [result for result in results if isinstance(result, PreparedPart)]
    return _assemble(config, parts, kitchen.stamped_date)


def cache_folder(config: Config) -> Path:
    """Where prepared data of this run is kept."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir).expanduser()
    return Path(config.output_dir).parent / CACHE_NAME


def _find_files(use: str, sources: Sequence[SourceConfig]) -> list[SourceFiles]:
    """Look for every source's files, and report all that are missing at once."""
    found: list[SourceFiles] = []
    problems: list[Problem] = []
    for name, source in zip(source_names(sources), sources, strict=True):
        try:
            files = expand_source(source)
            found.append(SourceFiles(name, use, source, files, [file_facts(file) for file in files]))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return found


@final
class _Kitchen:
    """Prepares parts with one tokenizer, template and set of keys."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._data = config.data
        self._policies = resolve_policies(config.data)
        self._encoder = Encoder(tokenizer, template, config.data, date_of_run(config))
        self._backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self.cache = cache_folder(config)
        self.stamped_date = str(self._encoder.today) if stamps_dates(template) else None
        self._made_from = {
            "format_version": FORMAT_VERSION,
            "tokenizer": digest_of([self._backend.to_str(), _special_tokens(tokenizer)]),
            "template": template,
            "today": self.stamped_date,
            "libraries": {name: version(name) for name in LIBRARIES},
            "policies": self._policies,
            **_keys(config.data),
        }

    def part(self, origin: SourceFiles) -> PreparedPart | Tally:
        """The source's part; or the tally of its rows, where some must not be passed over."""
        key = digest_of(
            {
                **self._made_from,
                "source": origin.source.model_dump(exclude={"weight"}),
                "name": origin.name,
                "files": [
                    [str(file), fact.digest] for file, fact in zip(origin.files, origin.facts, strict=True)
                ],
            }
        )
        folder = self.cache / key
        with one_at_a_time(self.cache, key):
            summary = read_summary(folder)
            if summary is None:
                outcome = self._make(origin, folder)
                if outcome.num_errors:
                    return outcome
                summary = read_summary(folder)
            else:
                mark_used(folder)
                log.info("%s: prepared before, found in %s", origin.name, folder)
        if summary is None:
            raise DataError(
                Problem(str(folder), "prepared data vanished", "Is something clearing the cache?")
            )
        return PreparedPart(origin, folder, summary)

    def _make(self, origin: SourceFiles, folder: Path) -> Tally:
        rows = read_rows(origin.source, origin.files, origin.name)
        first = list(itertools.islice(rows, PEEK_ROWS))
        fmt, sample = self._format(origin, first)
        work = BatchEncoder(self._encoder, self._backend, fmt, self._policies)
        batches = _batches(itertools.chain(first, rows))
        tally = Tally(self._data, self._policies)
        with staging(self.cache) as staged, progress(f"Preparing {origin.name}", origin.num_rows) as advance:
            writer = PartWriter(staged)
            for result in map_in_order(work, batches, self._num_workers(origin)):
                tally.add(result)
                writer.add(result.tokens, result.index)
                advance(result.num_rows)
            digest = writer.close()
            if not tally.num_errors:
                found = {"name": fmt.name, "columns": dict(fmt.columns)}
                summary = {"digest": digest, "format": found, "sample": sample, **tally.to_dict()}
                commit(staged, folder, summary)
        return tally

    def _format(self, origin: SourceFiles, first: Sequence[Row]) -> tuple[RowFormat, dict[str, Any]]:
        readable = [row for row in first if row.value is not None]
        if not first:
            raise DataError(Problem(origin.source.path, "there are no rows in it", "Is it the right file?"))
        if not readable:
            problems = [
                Problem(r.place, f"{r.problem.message} [{r.problem.rule}]") for r in first if r.problem
            ]
            what = f"none of the first {len(first)} rows can be read"
            head = Problem(origin.source.path, what, "Is it the right file?")
            raise DataError(head, *problems[:NUM_SHOWN], heading="")
        fmt = detect_format(origin.source, [row.value for row in readable if row.value is not None])
        sample = readable[0]
        assert sample.value is not None
        shown = {name: shorten(value, 200) for name, value in sample.value.items()}
        return fmt, {"place": sample.place, "row": shown}

    def _num_workers(self, origin: SourceFiles) -> int:
        if self._data.num_workers != "auto":
            return self._data.num_workers
        return 1 if origin.num_bytes < WORKER_BYTES else available_cores()


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        yield batch


def _keys(data: DataConfig) -> dict[str, Any]:
    """Keys of the config that change what a row becomes."""
    return {
        "max_tokens": data.max_tokens,
        "too_long": data.too_long,
        "train_on": data.train_on,
        "control_tokens": data.control_tokens,
        "bad_rows": data.bad_rows,
    }


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> Any:
    ids = tokenizer("a")["input_ids"]  # whether it puts a BOS before a text is no part of its JSON
    return [{k: str(v) for k, v in tokenizer.special_tokens_map.items()}, list(ids), len(tokenizer)]  # type: ignore[arg-type]


def _assemble(config: Config, parts: Sequence[PreparedPart], stamped_date: str | None) -> PreparedData:
    problem = bad_fraction_problem([part.summary for part in parts], config.data)
    if problem:
        raise DataError(problem)
    opened = [Part.open(part.folder) for part in parts]
    empty = [part for part, mapped in zip(parts, opened, strict=True) if not len(mapped)]
    if empty:
        raise DataError(*(_nothing_left(part) for part in empty))
    for part in parts:
        _tell_warnings(part)
    num_train = sum(part.origin.use == "train" for part in parts)
    names = [part.origin.name for part in parts]
    train = ExampleStore(opened[:num_train], names[:num_train])
    own = ExampleStore(opened[num_train:], names[num_train:]) if parts[num_train:] else None
    train, held_out = split_off(train, config.data.eval_fraction, config.train.seed)
    if held_out is None and config.data.eval_fraction > 0:
        _tell_nothing_held_out(config.data.eval_fraction, len(train))
    evaluation = ExampleStore.joined([store for store in (held_out, own) if store is not None])
    # Of `data.eval` nothing: a run may go on with other rows to evaluate on.
    fingerprint = digest_of(
        [[part.summary["digest"] for part in parts[:num_train]], num_train, config.data.eval_fraction]
        + ([config.train.seed] if held_out is not None else [])
    )
    report = build_report(config.data, [_described(part) for part in parts], opened, train, evaluation)
    _tell_shared_rows(report["eval_rows_in_training"])
    report |= {
        "packing": forecast_packing(config, train),
        "stamped_date": stamped_date,
        "fingerprint": fingerprint,
    }
    return PreparedData(train, evaluation, report, fingerprint)


def _tell_warnings(part: PreparedPart) -> None:
    """What its rows were not shown with, for runs that no `check` went before."""
    for text, entry in part.summary["warnings"].items():
        first = entry["places"][0]
        log.warning("%s: %s (%d examples, first at %s).", part.origin.name, text, entry["examples"], first)


def _tell_shared_rows(shared: Mapping[str, Any]) -> None:
    """An evaluation on what is trained on measures memory; nothing else of a run would show it."""
    if shared["rows"]:
        pair = shared["places"][0]
        log.warning(
            "data.eval shares %s with the training data (the first: %s = %s): there the evaluation measures "
            "what was learned by heart.",
            counted(shared["rows"], "row"),
            pair["place"],
            pair["same_as"],
        )


def _tell_nothing_held_out(fraction: float, num_examples: int) -> None:
    """A run without the evaluation that was asked for is told; small runs are to work all the same."""
    why = "there is only one training example"
    if num_examples > 1:
        why = f"all {num_examples:,} training examples come from equal rows"
    log.warning(
        "data.eval_fraction: is %g, but %s: none is held out, and nothing is evaluated. Give data.eval, or "
        "more rows that differ.",
        fraction,
        why,
    )


def _nothing_left(part: PreparedPart) -> Problem:
    """Why no row of a source is left, by rule, and what to do about the commonest one."""
    dropped: Mapping[str, Any] = part.summary["dropped"]
    reasons = [f"{rule}: {counted(entry['rows'], 'row')}" for rule, entry in dropped.items()]
    what = f"no row of it can be trained on ({', '.join(reasons) or 'it has none'})"
    commonest = max(dropped, key=lambda rule: dropped[rule]["rows"], default=None)
    return Problem(part.origin.source.path, what, RULES[commonest].cure if commonest else "")


def _described(part: PreparedPart) -> dict[str, Any]:
    origin = part.origin
    hidden = ("digest", "files_bytes")
    return {
        "name": origin.name,
        "path": origin.source.path,
        "use": origin.use,
        "files": [str(file) for file in origin.files],
        "bytes": origin.num_bytes,
        **{key: value for key, value in part.summary.items() if key not in hidden},
    }
