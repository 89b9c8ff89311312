"""How a process ends: nothing left undone, and no gloo thread that outlives the interpreter."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, threading, time
from burnish.runtime import leave

class Last:
    def __del__(self):
        sys.stderr.write("taken apart")  # stdout may be closed by then

last = Last()
atexit.register(print, "at exit")

def work():
    time.sleep(0.2)
    print("thread done")

threading.Thread(target=work).start()
if "member" in sys.argv:
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print("unflushed")
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("member", [True, False])
def test_leaves_nothing_undone(code: int, member: bool) -> None:
    """A member of a process group is not taken apart by Python; anybody else ends as ever."""
    command = [sys.executable, "-c", SCRIPT, str(code), *["member"] * member]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert sorted(ended.stdout.splitlines()) == ["at exit", "thread done", "unflushed"]
    assert ("taken apart" in ended.stderr) is not member
