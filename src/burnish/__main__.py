"""`python -m burnish` is `burnish`."""

import sys
from typing import NoReturn

from burnish.cli import main
from burnish.runtime import leave


def command() -> NoReturn:
    """Run a verb and end the process with its exit code."""
    code = 0
    try:
        main()
    except SystemExit as end:
        assert end.code is None or isinstance(end.code, int)  # messages are printed where they arise
        code = end.code or 0
    except BaseException as error:  # noqa: BLE001 - a bug, shown as Python would show it
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    leave(code)


if __name__ == "__main__":
    command()
