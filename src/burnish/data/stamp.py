"""The date that chat templates stamp into texts, one for a whole run, however often it is resumed."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

from burnish.config.schema import Config

REPORT_FILE = "data_report.json"
"""Where a run keeps its date, under `stamped_date`."""


def stamps_dates(template: str | None) -> bool:
    """Whether a template may write the date of the day on which it renders."""
    return template is not None and "strftime_now" in template


def today() -> datetime.date:
    """The date of `SOURCE_DATE_EPOCH` (https://reproducible-builds.org/docs/source-date-epoch/), so that
    a run can be repeated on another day, or today's."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    if seconds.isdigit():
        return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).date()
    return datetime.date.today()


def date_of_run(config: Config) -> datetime.date:
    """The date that a run stamps: the one it began with where it goes on, else `today`.

    A run that is resumed on another day would otherwise render other texts than it began with, and be
    refused as one of other data.
    """
    resume = config.checkpoint.resume
    if resume == "never" or os.environ.get("SOURCE_DATE_EPOCH", "").isdigit():
        return today()
    named = Path(resume)
    # A checkpoint lies in RUN/checkpoints/STEP; either may be a link to it, or lie behind one.
    folders = [path.parent.parent for path in (named, named.resolve())]
    for folder in [Path(config.output_dir)] if resume in ("auto", "must") else folders:
        try:
            report = json.loads((folder / REPORT_FILE).read_text("utf-8"))
            return datetime.date.fromisoformat(report["stamped_date"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return today()
