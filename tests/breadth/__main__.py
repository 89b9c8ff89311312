"""Look at every family and write what was seen: `PYTHONPATH=src:tests python -m breadth [FAMILY ...]`.

`docs/generate.py` makes the table of docs/models.md of it, and tests hold it to the truth.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from breadth.checks import Seen, look, read_seen, write_seen
from breadth.families import families
from rig.spawn import try_cases


def zero3(rows: Sequence[Seen], folder: Path) -> dict[str, str]:
    """What two ranks under ZeRO-3 say of each family that is trained at all."""
    cases = {
        row.family: {"kind": "partitioned", "family": row.family, "packed": row.packed}
        for row in rows
        if row.equal != "refused"
    }
    _, found = try_cases(cases, folder, 2)
    return {family: result["zero3"] for family, result in found.items()}


def main(chosen: Sequence[str]) -> None:
    """Look, and write."""
    known = families()
    rows = {family: row for family, row in read_seen().items() if family in known}
    for family in chosen or known:
        rows[family] = look(family)
    write_seen(list(rows.values()))
    looked = [rows[family] for family in chosen or known]
    with tempfile.TemporaryDirectory() as folder:
        for family, answer in zero3(looked, Path(folder)).items():
            rows[family] = replace(rows[family], zero3=answer)
    write_seen(list(rows.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
