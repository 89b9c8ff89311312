"""Speed and memory of a training step against its peers, on the same weights and tokens.

    python bench/step.py --quick                             # one table in a few minutes
    python bench/step.py --data alpaca.json --tokenizer FOLDER --write
    python bench/step.py --case qwen/alpaca --add bench/results/DATE-step.json
    python bench/step.py --case qwen/alpaca --curve --add bench/results/DATE-step.json

Parity first: loss and every gradient of step 1 against each document alone in fp32, no document sees another,
every supervised token once. Then one process per racer, all in turn, round by round (A B C A B C); in
each turn two steps that are not timed and then timed ones. A ratio is taken within a round; the median, the
least and the most are reported. See bench/README.md for who races and how.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
sys.path.insert(0, str(BENCH))

from data_path.machine import machine  # noqa: E402
from data_path.preparing import masks  # noqa: E402
from data_path.rows import read_rows, tokenizer_for  # noqa: E402
from step.cases import CASES, GPU_CASES, NUM_WINDOWS, QUICK, Case  # noqa: E402
from step.front_door import stage, time_split, train, zero_cost  # noqa: E402
from step.race import (  # noqa: E402
    ALWAYS,
    ALWAYS_ON_GPUS,
    ALWAYS_WHERE_CROWDED,
    PEERS,
    QUICKLY,
    Settings,
    run_case,
    run_curve,
)
from step.table import curve_sentence, printed, verdicts, write_page  # noqa: E402

QUICK_PEERS = ("trl", "trl-single")
NEAR_PEERS = ("trl-single",)
PEERS_VENV = BENCH.parent / "build" / "peers"


def examples_of(file: str | None, tokenizer_folder: str | None, num: int) -> list[Any]:
    """Rows as token ids and weights, by the same encoder as in a run."""
    rows = read_rows(file, num)
    tokenizer = tokenizer_for(tokenizer_folder, rows)
    batches = masks(rows, tokenizer)()
    return [done.example for batch in batches for done in batch if done.example is not None]


def peer_python(own_venv: bool) -> str:
    """The interpreter that TRL runs in: this one's, or one made here from the package index."""
    if not own_venv:
        return sys.executable
    python = PEERS_VENV / "bin" / "python"
    if not python.exists():
        venv.create(PEERS_VENV, with_pip=True)
        wanted = ["trl", "peft", "pydantic", "jaxtyping", "xxhash", "cyclopts"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return str(python)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    names = [case.name for case in (*CASES, *GPU_CASES)]
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, few peers and steps")
    parser.add_argument("--case", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("--racers", help="comma-separated: only these besides Burnish")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps in a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that are not timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", help="an Alpaca file, JSON or JSON lines; default: rows made on the spot")
    parser.add_argument("--tokenizer", help="folder of a fast tokenizer; default: one made from the rows")
    parser.add_argument("--peers-venv", action="store_true", help="run TRL in a venv of its own")
    parser.add_argument(
        "--front-door", type=int, metavar="N", help="instead: N examples through burnish train"
    )
    parser.add_argument("--curve", action="store_true", help="instead: the loss curve against plain fp32's")
    parser.add_argument("--zero", action="store_true", help="instead: what ZeRO-2 on two ranks costs a step")
    parser.add_argument("--add", type=Path, help="add the cases to this JSON file (made if it is not there)")
    parser.add_argument("--write", action="store_true", help="write bench/results and the docs")
    args = parser.parse_args()
    if args.rounds * (args.warmup + args.steps) > NUM_WINDOWS:
        parser.error(f"--rounds x (--warmup + --steps) is more than the {NUM_WINDOWS} steps of a case")
    return args


def racers_of(case: Case, args: argparse.Namespace) -> list[str]:
    """Who races in this case."""
    peers = QUICK_PEERS if args.quick else PEERS if case.all_peers else NEAR_PEERS
    always = ALWAYS if case.all_peers and not args.quick else QUICKLY
    if args.device == "cuda":
        always = ALWAYS_WHERE_CROWDED if case.crowded else ALWAYS_ON_GPUS
    return list(dict.fromkeys([*always, *(args.racers.split(",") if args.racers else peers)]))


def write_json(path: Path, results: dict[str, Any]) -> None:
    """After every case: what has been measured stays if a later one fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def through_the_door(args: argparse.Namespace) -> dict[str, Any]:
    """`--front-door` and `--zero`."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="burnish-door-") as scratch:
        rows = read_rows(args.data, args.front_door or 400)
        rows = [
            {**row, "instruction": f"{i}. {row['instruction']}"} for i, row in enumerate(rows)
        ]  # no twins
        tokenizer = tokenizer_for(args.tokenizer, rows)
        stage(Path(scratch), "llama", rows, tokenizer, small=args.front_door is not None)
        if args.front_door:
            found["front_door"] = time_split(train(Path(scratch), []))
        if args.zero:
            found["zero_2_on_two_ranks"] = zero_cost(Path(scratch), args.rounds)
    print(json.dumps(found, indent=1), flush=True)
    return found


def measured(
    case: Case, rows: list[Any], args: argparse.Namespace, python: str, results: dict[str, Any]
) -> str:
    """Race a case, or take its loss curve, into the results; what to print."""
    if args.curve:
        curve = run_curve(case, rows, args.device)
        results.setdefault("curves", {})[case.name] = {"machine": machine(), **curve}
        return f"{case.name}: {curve_sentence(curve)}"
    settings = Settings(args.rounds, args.steps, args.warmup, racers_of(case, args), python, args.device)
    found = run_case(case, rows, settings)
    curve = results.get("curves", {}).get(case.name)
    found["targets_met"] = verdicts(found, curve)
    results["cases"][case.name] = found
    return printed(found, curve)


def main() -> None:
    """Parse, race, print, write."""
    args = parse()
    python = peer_python(args.peers_venv)
    chosen = args.case or (QUICK if args.quick else [case.name for case in CASES])
    path = args.add or (BENCH / "results" / f"{date.today().isoformat()}-step.json" if args.write else None)
    results: dict[str, Any] = {"cases": {}}
    if path is not None and path.exists():
        results = json.loads(path.read_text("utf-8"))
    here = {"machine": machine(), "data": "an Alpaca file" if args.data else "made up"}
    if not (args.curve and results["cases"]):  # tables keep what they were measured on
        results |= here
    if args.front_door or args.zero:
        results |= through_the_door(args)
        chosen = []
    rows = examples_of(args.data, args.tokenizer, 1000) if chosen else []
    for case in (case for case in (*CASES, *GPU_CASES) if case.name in chosen):
        print(measured(case, rows, args, python, results), flush=True)
        if path is not None:
            write_json(path, results)
    if path is not None:
        write_json(path, results)
    if args.write:
        write_page(results)


if __name__ == "__main__":
    main()
