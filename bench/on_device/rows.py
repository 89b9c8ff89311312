"""Rows of a part's table, on the disk as soon as they are known: a part may be ended at any time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Rows:
    """A list of rows that is kept in a file too, one JSON object a line."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.all: list[dict[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """One more."""
        self.all.append(dict(row))
        with self._file.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")
