"""A worker of several: joins the process group once and runs a list of cases, because importing
deepspeed and joining take longer than a case. `python -m rig.worker CASES.json OUT_DIR`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from burnish.runtime import (
    leave,
    pick_device,
    ranks_from_environment,
    setup_logging,
    start_process_group,
)
from rig.cases import CASES


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    out_dir = Path(sys.argv[2])
    torch.set_num_threads(1)
    ranks = ranks_from_environment()
    setup_logging(ranks)
    start_process_group(ranks, pick_device(ranks), timeout_seconds=120)
    for name, case in cases.items():
        started = time.perf_counter()
        result = CASES[case["kind"]](case, ranks, out_dir / name)
        result["seconds"] = time.perf_counter() - started
        path = out_dir / f"{name}.{ranks.rank}.json"
        path.write_text(json.dumps(result))
    leave(0)


if __name__ == "__main__":
    main()
