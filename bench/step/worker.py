"""One racer in a process of its own: `python -m step.worker NAME FOLDER`, told by `step.race`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from burnish.runtime import quieten_libraries
from step.cases import read_race
from step.turns import RaceOver, Turns, private_stdout


def main() -> None:
    """Load, say so, and run the steps that are asked for until told to stop."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    answers = private_stdout()
    quieten_libraries()
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    turns = Turns(answers, wait)
    race = read_race(folder)
    try:
        if name.startswith("trl"):
            from step.trl_racer import trl

            trl(race, turns, name)
        else:
            from step import racers

            run = {
                "burnish": racers.burnish,
                "burnish-compiled": racers.burnish_compiled,
                "hf-packed": racers.hf_packed,
                "hf-packed-as-is": racers.hf_packed_as_is,
                "hf-packed-compiled": racers.hf_packed_compiled,
                "hf-padded": racers.hf_padded,
                "openrlhf": racers.openrlhf,
                "matrix": racers.matrix,
            }[name]
            run(race, turns)
    except RaceOver:
        return
    raise SystemExit(f"{name} came to its last step before the race was over")


if __name__ == "__main__":
    main()
