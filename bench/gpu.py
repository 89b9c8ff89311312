"""Everything that only a GPU can show, in one command.

    python bench/gpu.py --out results                    # all of it, on one CUDA device
    python bench/gpu.py --only attention head            # some of it
    python bench/gpu.py --only speed --models 8b-lora    # one run of `speed`; `--case` does so for `race`
    python bench/gpu.py --minutes 9 --scratch /tmp/gpu   # what fits into nine minutes; says what is left
    python bench/gpu.py --device cpu --quick             # does the script itself work?
    python bench/gpu.py --wheels wheels                  # packages for a machine that has only PyTorch

Each part runs in a process of its own, each model of `speed` and each case of `race` too, for nine minutes at
most, so that one and its start fit where a machine is lent for ten at a time; all together may take an hour
and a half. A part that fails or hangs takes
nothing else down, and keeps what it had measured. `gpu.json` in `--out` holds what every part found, with
date and versions; it is written after each part, and parts of earlier calls stay in it. The same stands as a
table on the terminal. Exit code 1 where a check failed. Logs and runs go below `--scratch`.

Parts: `machine` (matrix rate) · `tests` (those marked gpu) · `attention` (varlen against each document
alone, and its time against SDPA with a mask) · `head` (loss and gradients against full logits, time,
memory) · `syncs` (places where a step makes the host wait) · `engines` (local and ZeRO 0 to 3 on NCCL, bf16,
fp16 and fp32: one run, the same losses; QLoRA and 8-bit AdamW) · `speed` (`burnish train` at 0.5B, 1.5B and
8B, full and LoRA, layers compiled and not: tokens/s, share of the matrix rate, peak memory against `plan`) ·
`race` (the step against TRL and the others at 0.5B, 1.5B and the sizes of the CPU's tables, by
`bench/step.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

PARTS = ("machine", "tests", "attention", "head", "syncs", "engines", "speed", "race")
PART_LIMIT_SECONDS = {"engines": 540, "speed": 540, "race": 540}
DEFAULT_LIMIT_SECONDS = 240
NEEDED_SECONDS = {"engines": 240, "speed": 120, "race": 180}
DEFAULT_NEEDED_SECONDS = 60
"""With less than this left of `--minutes`, a process is not started: it would be stopped before its end."""

WHEELS = (
    "annotated-types", "attrs", "beartype", "bitsandbytes", "cyclopts", "datasets", "deepspeed", "dill",
    "docstring-parser", "docutils", "einops", "hjson", "jaxtyping", "msgpack", "multiprocess", "peft",
    "pyarrow", "py-cpuinfo", "pydantic", "pydantic-core", "rich-rst", "trl", "typing-inspection",
    "wadler-lindig", "xxhash",
)  # fmt: skip
"""What Burnish and this script need besides PyTorch, transformers, pandas, pytest, rich
and TensorBoard."""
UNUSED = {
    "bitsandbytes": r"libbitsandbytes_(?!(cpu|cuda130)\.so)",
    "pyarrow": r"^pyarrow/(include|tests)/|flight",
}
"""Files of wheels that stay behind, so that all fit into 64 MiB with the checkout: libraries for other
devices (which one PyTorch wants says `torch.version.cuda`), and parts that nobody imports."""
SMALLER = {"pyarrow": "pyarrow==24.0.0"}
"""Older versions where the lock's is so large that the wheels would not fit into 64 MiB with the checkout."""


def main() -> None:
    """Parse, run every part, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--scratch", type=Path, help="logs, and runs while they last; OUT/scratch unless given"
    )
    parser.add_argument("--models", nargs="*", help="of `speed`: their names, all unless given")
    parser.add_argument("--case", nargs="*", help="of `race`: names as `bench/step.py --case` takes them")
    parser.add_argument("--minutes", type=float, help="end within so many; what was not begun is named")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it works, not how fast")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--wheels", type=Path, help="download packages for Python 3.12 into this folder, and end"
    )
    options = parser.parse_args()
    if options.wheels:
        download_wheels(options.wheels)
        return
    options.scratch = options.scratch or options.out / "scratch"
    options.out.mkdir(parents=True, exist_ok=True)
    options.scratch.mkdir(parents=True, exist_ok=True)
    if options.part:
        _files(options.scratch, options.part)["result"].write_text(json.dumps(run_part(options)))
        return
    parts, left = run_pieces(options)
    print_table(parts)
    if left:
        print(f"\nnot begun: {', '.join(left)}")
    sys.exit(any(not part["ok"] for part in parts.values()))


def run_pieces(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every part that was asked for and there is time for, and what there was no time for."""
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    parts: dict[str, dict[str, Any]] = {}
    left: list[str] = []
    for name in options.only:
        needed = NEEDED_SECONDS.get(name, DEFAULT_NEEDED_SECONDS)
        longest = PART_LIMIT_SECONDS.get(name, DEFAULT_LIMIT_SECONDS)
        for piece in pieces(name, options):
            limit = min(longest, end - time.monotonic())
            if limit < needed:
                left.append(" ".join([name, *_own(name, piece)]))
                continue
            parts[name] = _joined(parts.get(name), start_part(name, piece, limit))
            _keep(options.out / "gpu.json", name, parts[name])
    return parts, left


_FLAGS = {"speed": "models", "race": "case"}
"""Of the parts that run in pieces: what names one."""


def pieces(name: str, options: argparse.Namespace) -> list[argparse.Namespace]:
    """What of a part runs in a process of its own: each model and each race, which take minutes; else all."""
    from on_device.runs import RACES, speed_names

    if options.quick or name not in _FLAGS:
        return [options]
    flag = _FLAGS[name]
    chosen = getattr(options, flag) or {"speed": speed_names(), "race": list(RACES)}[name]
    return [argparse.Namespace(**{**vars(options), flag: [one]}) for one in chosen]


def _own(name: str, piece: argparse.Namespace) -> list[str]:
    """The models or cases of a piece."""
    return getattr(piece, _FLAGS[name]) or [] if name in _FLAGS else []


def _joined(before: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
    """A part and the pieces of it that ran before."""
    if before is None:
        return part
    rows = [*before.get("rows", []), *part.get("rows", [])]
    seconds = before["seconds"] + part["seconds"]
    errors = [found["error"] for found in (before, part) if "error" in found]
    error = {"error": "\n".join(errors)} if errors else {}
    return {**before, **part, "ok": before["ok"] and part["ok"], "rows": rows, "seconds": seconds, **error}


def _files(scratch: Path, part: str) -> dict[str, Path]:
    """A part's files: what it found, rows as it finds them, and its log."""
    kinds = {"result": "json", "rows": "rows.jsonl", "log": "log"}
    return {kind: scratch / f"{part}.{ending}" for kind, ending in kinds.items()}


def _keep(file: Path, name: str, part: dict[str, Any]) -> None:
    """Add a part to what the file holds; an earlier call's rows stay, unless they were found anew."""
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
    kept |= {"date": f"{datetime.date.today()}", "python": platform.python_version()}
    old = kept["parts"].get(name, {}).get("rows", [])
    if "rows" in part and name in ("speed", "race"):  # the parts that may be run in pieces
        anew = {row["run"] for row in part["rows"]}
        part = {**part, "rows": [row for row in old if row["run"] not in anew] + part["rows"]}
    kept["parts"][name] = part
    file.write_text(json.dumps(kept, indent=1) + "\n")


def download_wheels(folder: Path) -> None:
    """The lock's versions as wheels for Linux on x86-64 and Python 3.12, without their dependencies."""
    lines = [line.split(";")[0].strip() for line in (ROOT / "requirements.lock").read_text().splitlines()]
    versions = {line.split("==")[0].lower(): line for line in lines if "==" in line}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    platforms = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
    target = ["--python-version", "3.12", "--implementation", "cp"]
    target += [word for name in platforms for word in ("--platform", name)]
    for name in WHEELS:
        pinned = SMALLER.get(name) or versions.get(name, name)
        if name == "deepspeed":  # published as source only; pure Python unless told to build its kernels
            command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), pinned]
            subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
            continue
        download = ["download", "--no-deps", "--only-binary=:all:", *target, "-d", str(folder), pinned]
        subprocess.run([*pip, *download], check=True)
    for name, unused in UNUSED.items():
        for wheel in folder.glob(f"{name}-*.whl"):
            leave_out(wheel, re.compile(unused))
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{len(list(folder.glob('*.whl')))} wheels, {size / 2**20:.0f} MiB in {folder}")


def leave_out(wheel: Path, unused: re.Pattern[str]) -> None:
    """Write a wheel anew without files of these names."""
    with zipfile.ZipFile(wheel) as whole:
        kept = {name: whole.read(name) for name in whole.namelist() if not unused.search(name)}
    record = next(name for name in kept if name.endswith(".dist-info/RECORD"))
    lines = kept[record].decode().splitlines()
    kept[record] = "".join(f"{line}\n" for line in lines if line.split(",")[0] in kept).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as smaller:
        for name, content in kept.items():
            smaller.writestr(name, content)


def start_part(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run a part in its own process for `limit` seconds at most, and end whatever it leaves running."""
    files = _files(options.scratch, name)
    for kind in ("result", "rows"):
        files[kind].unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--device", options.device]
    command += ["--out", str(options.out), "--scratch", str(options.scratch)]
    command += ["--quick"] * options.quick
    for flag in ("models", "case"):
        chosen = getattr(options, flag)
        command += [f"--{flag}", *chosen] if chosen else []
    print(f"== {name}", flush=True)
    began = time.monotonic()
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    with files["log"].open("w") as log:
        # A session of its own: runs that it started must not use the device beside the next part.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
            ended = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            ended = f"still running after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = {"seconds": round(time.monotonic() - began, 1)}
    if not ended:
        return {**json.loads(files["result"].read_text()), **took}
    problem = f"{ended}\n{files['log'].read_text()[-2000:]}"  # killed, it may have said nothing
    rows = files["rows"].read_text().splitlines() if files["rows"].is_file() else []
    return {"ok": False, "error": problem, "rows": [json.loads(row) for row in rows], **took}


def run_part(options: argparse.Namespace) -> dict[str, Any]:
    """The part itself, in this process."""
    from on_device import kernels, runs
    from on_device.rows import Rows

    device, quick, scratch = options.device, options.quick, options.scratch
    note = Rows(_files(scratch, options.part)["rows"])
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "machine": lambda: kernels.machine(device, quick),
        "tests": lambda: runs.marked_tests(device),
        "attention": lambda: kernels.attention(device, quick, note),
        "head": lambda: kernels.head(device, quick, note),
        "engines": lambda: runs.engines(scratch / "engines", device, note),
        "syncs": lambda: kernels.syncs(device),
        "speed": lambda: runs.speed(scratch / "speed", device, quick, options.models, note),
        "race": lambda: runs.race(options.out, device, quick, options.case, note),
    }
    return parts[options.part]()


def print_table(parts: dict[str, dict[str, Any]]) -> None:
    """One line per number."""
    for name, part in parts.items():
        print(f"\n{name}: {'ok' if part['ok'] else 'FAILED'}")
        for key, value in part.items():
            if key == "rows":
                for row in value:
                    print("   ", "  ".join(f"{k} {v}" for k, v in row.items()))
            elif key != "ok":
                print(f"    {key}: {value}")


if __name__ == "__main__":
    main()
