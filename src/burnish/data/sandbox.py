"""A template that comes from somewhere else is tried out where it can do no harm.

Jinja's sandbox keeps a template from Python's internals, not from filling the memory or never ending:
`{% for i in range(99999) %}` inside itself, or `'x' * 10**10`, pass it. So before a template is used, a
process of its own renders a made-up conversation with it, under a limit of memory and time.
"""

from __future__ import annotations

import datetime
import subprocess
import sys

from burnish.data.jinja import TEMPLATE_FAILURES, TrackedTemplate
from burnish.errors import DataError, Problem

_MEMORY_BYTES = 1 << 30
_CPU_SECONDS = 5
_WALL_SECONDS = 60
"""Longer than the limit on computing: starting Python takes a while on a busy machine."""
_MAX_CHARACTERS = 10_000_000
"""No template writes this much around a conversation of a few words."""

_EXIT_TOO_MUCH = 42


def probe_template(source: str) -> None:
    """Render a small conversation with the template in a limited process.

    A template that refuses the conversation passes: what it says is shown with the rows.

    Raises:
        DataError: The template takes more than 1 GiB of memory, 5 s of computing or 10 million
            characters for a conversation of a few words.
    """
    command = [sys.executable, "-m", "burnish.data.sandbox"]
    try:
        run = subprocess.run(
            command,
            input=source.encode(errors="replace"),
            capture_output=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
        passed = run.returncode == 0
    except subprocess.TimeoutExpired:
        passed = False
    if not passed:
        raise DataError(
            Problem(
                "data.chat_template",
                "the template needs more than 1 GiB, 5 s or 10 million characters for a conversation "
                "of a few words",
                "Use a template that you trust, such as a built-in one.",
            )
        )


def _limit_this_process() -> None:
    try:
        import resource
    except ImportError:  # not on Windows, where the time limit alone must do
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))


def _try_out(source: str) -> int:
    """The exit code of the limited process."""
    ask, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    variables = {**special, "tools": None, "documents": None}
    for messages, prompt in (([ask, answer], False), ([ask], True)):
        try:
            template = TrackedTemplate(source, datetime.date(2000, 1, 1))
            text = template.plain(messages, {**variables, "add_generation_prompt": prompt})
        except MemoryError:
            return _EXIT_TOO_MUCH
        except TEMPLATE_FAILURES:
            continue
        if len(text) > _MAX_CHARACTERS:
            return _EXIT_TOO_MUCH
    return 0


if __name__ == "__main__":
    _limit_this_process()
    sys.exit(_try_out(sys.stdin.buffer.read().decode(errors="replace")))
