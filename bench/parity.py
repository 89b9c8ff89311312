"""Whether our loss curve is that of OpenRLHF's and TRL's own training code, on a CPU, in minutes.

    make parity                                         or: python bench/parity.py
    python bench/parity.py --data alpaca.json --tokenizer FOLDER --out bench/results/parity.json
    python bench/parity.py --peers trl                  TRL alone: no environment is made

One tiny model, one set of rows, one set of hyperparameters. Ours is `burnish train CONFIG`, read from
metrics.jsonl. OpenRLHF's is its published package (train_sft.py with its own data set, actor, loss, DeepSpeed
strategy and loop) in an environment that is made once (--env, by default in the user's cache);
`parity_peers/openrlhf_run.py` names what had to be replaced for a CPU. TRL's is its SFTTrainer. All see the
same examples in each step; ours cuts the step into other micro-batches. Exit code 1 where a curve in fp32 is
off by more than --tolerance at any step, or where token ids or learned positions differ. bf16 is reported
only, since each side rounds at other places.

Then what differs by design is shown on small examples. --docs writes all of it into docs/parity.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import Any

from data_path.rows import made_up_rows, read_rows, tokenizer_for
from parity_peers import differences
from parity_peers.curves import largest_difference, weights_apart
from parity_peers.environment import default_folder, make_environment
from parity_peers.job import MAX_TOKENS, PLAIN, Job, Setting, make_job, our_config, train_ours, view_ours
from parity_peers.job import read_rows as job_rows
from parity_peers.page import write_page
from parity_peers.peers import Peer, Peers, openrlhf_case, trl_case
from tokenizers.decoders import ByteLevel

from burnish.runtime import quieten_libraries

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parity.md"
NUM_STEPS = 50


SETTINGS = (
    Setting(False, "fp32", "equal"),
    Setting(False, "fp32", "mixed"),
    Setting(True, "fp32", "mixed"),
    Setting(False, "bf16", "mixed"),
)


@dataclass(frozen=True)
class Comparison:
    """A peer's run beside ours."""

    peer: str
    setting: str
    packed: bool
    judged: bool
    first_loss: float
    last_loss: float
    largest_loss_difference: float
    largest_norm_difference: float
    """Of gradient norms, relative."""
    weights_apart: float
    """Distance of the final weights, as a share of the way that training went."""


def main() -> None:
    """Parse, compare, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", default="openrlhf,trl", help="which of openrlhf,trl")
    parser.add_argument("--env", type=Path, default=default_folder(), help="OpenRLHF's environment")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the loss, at every step")
    parser.add_argument("--data", help="rows in Alpaca's format; made on the spot without")
    parser.add_argument("--tokenizer", help="a tokenizer's folder; trained on the spot without")
    parser.add_argument("--work", type=Path, help="keep everything here: an empty or new folder")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    parser.add_argument("--docs", action="store_true", help="write docs/parity.md's tables and examples")
    options = parser.parse_args()
    wanted = options.peers.lower().split(",")
    names: list[Peer] = [peer for peer in ("OpenRLHF", "TRL") if peer.lower() in wanted]
    peers = Peers(make_environment(options.env) if "OpenRLHF" in names else None)
    with tempfile.TemporaryDirectory(prefix="burnish-parity-") as scratch:
        result = compare_all(options.work or Path(scratch), peers, names, options)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.docs:
        write_page(PAGE, result)
    sys.exit(0 if result["equal"] else 1)


def compare_all(
    folder: Path, peers: Peers, names: Sequence[Peer], options: argparse.Namespace
) -> dict[str, Any]:
    """Everything, as it goes into the JSON; the table is printed on the way."""
    num_rows = 3 * options.steps * 8
    rows = read_rows(options.data, num_rows) if options.data else made_up_rows(num_rows)
    quieten_libraries()
    tokenizer = readable(tokenizer_for(options.tokenizer, rows))
    job = make_job(folder, rows, tokenizer, options.steps)
    same_data = [compare_data(job, peers, name) for name in names]
    print(f"{'':34}{'largest difference':>20}{'final weights':>16}", flush=True)
    runs, comparisons = compare_curves(job, peers, names)
    control = control_run(job, runs["full-fp32-mixed"])
    print(f"{'control: ours, betas 0.9, 0.99':34}{control:>20.1e}  which must be seen", flush=True)
    equal = all(c.largest_loss_difference <= options.tolerance for c in comparisons if c.judged)
    equal = equal and control > options.tolerance and all(d["equal"] for d in same_data)
    print(f"Every curve in fp32 within {options.tolerance:g}, data equal: {equal}")
    reported = {"Burnish": (runs["full-fp32-mixed"]["final"], runs["full-fp32-mixed"]["eval_loss"][-1])}
    for name in names:
        made = runs[f"{name}-full-fp32-mixed"]
        reported[name] = (made["final"], made["eval_loss"][-1])
    return {
        **circumstances(options, len(tokenizer)),
        "equal": equal,
        "tolerance": options.tolerance,
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "control_difference": control,
        "data": same_data,
        "versions": {name: runs[f"{name}-full-fp32-mixed"]["versions"] for name in names},
        "overrides": runs["OpenRLHF-full-fp32-mixed"]["overrides"] if "OpenRLHF" in names else {},
        "examples": differences.token_examples(job, peers, names),
        "windows": differences.windows(job, peers) if "OpenRLHF" in names else None,
        "evaluation": differences.evaluation(job, reported),
        "first_rates": differences.first_rates(options.steps),
        "curves": {name: runs[name]["loss"] for name in runs},
    }


def readable(tokenizer: Any) -> Any:
    """With a decoder, which the tokenizer that is made on the spot lacks: its tokens could not be read."""
    if tokenizer.backend_tokenizer.decoder is None:
        tokenizer.backend_tokenizer.decoder = ByteLevel()
    return tokenizer


def circumstances(options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """When and with what."""
    return {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "ours": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "rows": "Alpaca file" if options.data else "made on the spot",
        "vocabulary": vocabulary,
        "steps": options.steps,
    }


def compare_curves(job: Job, peers: Peers, names: Sequence[Peer]) -> tuple[dict[str, Any], list[Comparison]]:
    """Train every setting with everybody."""
    runs: dict[str, Any] = {}
    comparisons = []
    for setting in SETTINGS:
        name = f"ours-{setting.name}"
        runs[setting.name] = ours = train_ours(job, name, our_config(job, setting, job.folder / name))
        ways = [(peer, False) for peer in names]
        if setting == PLAIN and "OpenRLHF" in names:
            ways.append(("OpenRLHF", True))
        for peer, packed in ways:
            made = peers.train(peer, job, setting, packed)
            runs[f"{peer}-{setting.name}{'-packed' if packed else ''}"] = made
            comparisons.append(compare(job, peer, setting, packed, ours, made))
            _print(comparisons[-1])
    return runs, comparisons


def compare(
    job: Job, peer: str, setting: Setting, packed: bool, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Comparison:
    """The two curves and the two results."""
    norms = zip(ours["grad_norm"], theirs["grad_norm"], strict=True)
    return Comparison(
        peer=peer,
        setting=setting.name,
        packed=packed,
        judged=setting.dtype == "fp32",
        first_loss=ours["loss"][0],
        last_loss=ours["loss"][-1],
        largest_loss_difference=largest_difference(ours["loss"], theirs["loss"]),
        largest_norm_difference=max(abs(a - b) / a for a, b in norms),
        weights_apart=weights_apart(job, setting, ours["final"], theirs["final"]),
    )


def control_run(job: Job, right: Mapping[str, Any]) -> float:
    """A run of ours with a slightly wrong optimizer against the right one: a comparison that must fail."""
    config = our_config(job, PLAIN, job.folder / "control")
    config["optim"]["betas"] = [0.9, 0.99]
    return largest_difference(right["loss"], train_ours(job, "control", config)["loss"])


def compare_data(job: Job, peers: Peers, name: Peer) -> dict[str, Any]:
    """Token ids and learned positions of all training rows, ours beside the peer's.

    What stands behind the last learned token (a line break of the template) may be there or not: it has no
    part in the loss.
    """
    rows = job_rows(job.rows("mixed"))
    config = our_config(job, PLAIN, job.folder / "unused")
    ours = view_ours(config, job.folder / "view.yaml", len(rows))
    make = openrlhf_case if name == "OpenRLHF" else trl_case
    options = {} if name == "OpenRLHF" else {"assistant_only_loss": True}
    case = make(job.model, rows, MAX_TOKENS, **options)
    theirs = peers.examples(name, job.folder / f"data-{name}.json", [case])[0]
    pairs = list(zip_longest(map(up_to_last_learned, ours), map(up_to_last_learned, theirs)))
    num_equal = sum(one == other for one, other in pairs)
    num_tokens = sum(len(row["ids"]) for row in theirs)
    print(f"{name}: {num_equal} of {len(pairs)} rows have our token ids and learned positions", flush=True)
    return {
        "peer": name,
        "rows": len(rows),
        "tokens": num_tokens,
        "equal": num_equal == len(pairs) == len(rows),
    }


def up_to_last_learned(row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """Token ids and learned positions, as far as they have a part in the loss."""
    end = max((i for i, learned in enumerate(row["learned"]) if learned), default=-1) + 1
    return list(row["ids"][:end]), list(row["learned"][:end])


def _print(c: Comparison) -> None:
    name = f"{c.peer} {c.setting}{' packed' if c.packed else ''}"
    note = "" if c.judged else "  reported only"
    print(f"{name:34}{c.largest_loss_difference:>20.1e}{c.weights_apart:>16.1e}{note}", flush=True)


if __name__ == "__main__":
    main()
