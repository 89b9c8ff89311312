"""What a run writes down about itself before it starts: the config, the plan, the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.config.load import dump_config
from burnish.config.schema import Config
from burnish.durable import replace_text
from burnish.errors import MachineError, Problem
from burnish.plan import Plan
from burnish.runtime import Ranks


def write_run_files(
    run_dir: Path, config: Config, plan: Plan, data_report: Mapping[str, Any], ranks: Ranks
) -> None:
    """Write `config.yaml` (as resolved), `plan.json` and `data_report.json`, by rank 0.

    Raises:
        MachineError: The folder cannot be written.
    """
    if not ranks.is_main:
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # A run that goes on reads what it was in the old ones: they are replaced whole.
        replace_text(run_dir / "config.yaml", dump_config(config))
        for name, content in (("plan.json", plan.to_dict()), ("data_report.json", dict(data_report))):
            replace_text(run_dir / name, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise MachineError(
            Problem("output_dir", f"{run_dir} cannot be written: {error}", "Choose another output_dir.")
        ) from error
