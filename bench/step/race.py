"""The one who calls the turns: a process for each racer, A B C A B C, and what comes of it."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.plan.shapes import ModelShape
from burnish.runtime import available_cores
from step.cases import Case, python_path, read_race, write_case
from step.trl_grid import TRL_GRID

BENCH = Path(__file__).parents[1]
ALWAYS = ("matrix", "burnish", "burnish-compiled", "hf-packed", "hf-packed-as-is", "hf-packed-compiled")
QUICKLY = ("matrix", "burnish", "hf-packed", "hf-packed-as-is")
"""Without who compiles, a minute each."""
ALWAYS_ON_GPUS = ("matrix", "burnish", "burnish-compiled", "hf-packed")
"""There is no allocator setting there, and all who race are on the device at once."""
ALWAYS_WHERE_CROWDED = ("matrix", "burnish")
PEERS = ("hf-padded", "openrlhf", *TRL_GRID)


@dataclass(frozen=True)
class Settings:
    """How long and with whom."""

    num_rounds: int
    steps: int
    """Timed steps of a turn."""
    warmup: int
    """Steps before them in each turn that are not timed: the memory given back after the last turn takes
    some to come back."""
    racers: Sequence[str]
    peer_python: str
    device: str

    @property
    def num_steps(self) -> int:
        """Of each racer, timed or not."""
        return self.num_rounds * (self.warmup + self.steps)


class Racer:
    """A worker process, spoken to in lines.

    Args:
        name: As `step.worker` takes it.
        folder: The case.
        python: Its interpreter.
        device: cpu or cuda.
    """

    def __init__(self, name: str, folder: Path, python: str, device: str) -> None:
        self.name = name
        self._log = (folder / f"{name}.log").open("w+")
        env = dict(os.environ)
        env["PYTHONPATH"] = python_path()
        env.setdefault("OMP_NUM_THREADS", str(available_cores()))
        if device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        command = [python, "-m", "step.worker", name, str(folder)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=env, cwd=BENCH
        )
        self.ready: dict[str, Any] = {}

    def answer(self) -> dict[str, Any]:
        """The next line it says.

        Raises:
            RuntimeError: It ended instead; what it printed is in the message.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} ended:\n{self._log.read()[-4000:]}")
        return json.loads(line)

    def turn(self, steps: int, warmup: int) -> dict[str, Any]:
        """Have it run `warmup` steps that are not timed and `steps` that are."""
        self._say(str(warmup + steps))
        said = self.answer()
        return {**said, "seconds": said["seconds"][warmup:]}

    def stop(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._say("stop")
        self._process.communicate()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def run_case(case: Case, rows: Sequence[Any], settings: Settings) -> dict[str, Any]:
    """Gates, then the race."""
    with tempfile.TemporaryDirectory(prefix="burnish-step-") as scratch:
        folder = Path(scratch)
        write_case(case, rows, folder)
        _tell(f"{case.name}: everything is written, the gates begin")
        gates = _judged(folder, "step.gates", settings.device)
        _tell("the racers start")
        racers: dict[str, Racer] = {}
        try:
            racers = {name: _racer(name, folder, settings) for name in settings.racers}
            lost = _ready(racers)
            turns = _take_turns(racers, settings, lost)
            ready = {name: racer.ready for name, racer in racers.items()}
        finally:
            for racer in racers.values():
                racer.stop()
        facts = _facts(folder, case, settings)
    told = {"case": case.name, "device": settings.device, "gates": gates, "lost": lost}
    return {**told, **facts, **_summary(turns, ready, facts)}


def run_curve(case: Case, rows: Sequence[Any], device: str) -> dict[str, Any]:
    """The loss curve of every window of a case, ours beside plain fp32's."""
    with tempfile.TemporaryDirectory(prefix="burnish-curve-") as scratch:
        folder = Path(scratch)
        write_case(case, rows, folder)
        return _judged(folder, "step.curve", device)


def _judged(folder: Path, module: str, *args: str) -> dict[str, Any]:
    """What a judge, a process of its own, says of the case in the folder."""
    env = dict(os.environ)
    env["PYTHONPATH"] = python_path()
    command = [sys.executable, "-m", module, str(folder), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=BENCH, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} could not be run:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def _racer(name: str, folder: Path, settings: Settings) -> Racer:
    python = settings.peer_python if name.startswith("trl") else sys.executable
    return Racer(name, folder, python, settings.device)


def _ready(racers: Mapping[str, Racer]) -> dict[str, str]:
    """Wait for all of them; those that ended instead, and what they said."""
    lost: dict[str, str] = {}
    for name, racer in racers.items():
        with _may_drop_out(name, lost):
            racer.ready = racer.answer()
    return lost


@contextlib.contextmanager
def _may_drop_out(name: str, lost: dict[str, str]) -> Iterator[None]:
    """A peer that ends, for want of memory or of a package, is noted; without ours there is no race."""
    try:
        yield
    except (RuntimeError, BrokenPipeError) as error:
        if name in ("burnish", "matrix"):
            raise
        lost[name] = str(error)[-1000:]
        _tell(f"{name} dropped out: {error}")


def _take_turns(
    racers: dict[str, Racer], settings: Settings, lost: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Rounds; after the first one only the faster of TRL's tuned settings goes on besides its defaults."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in racers}
    racing = list(racers)
    for number in range(settings.num_rounds):
        racing = [name for name in racing if name not in lost]
        for name in racing:
            # With those that are not timed, whole rounds of the matrices' two shapes.
            steps = 4 + settings.warmup % 2 if name == "matrix" else settings.steps
            with _may_drop_out(name, lost):
                turns[name].append(racers[name].turn(steps, settings.warmup))
                seconds = statistics.median(turns[name][-1]["seconds"])
                _tell(f"round {number + 1}, {name}: {seconds:.3g} s a step")
        if number == 0:
            tuned = [name for name in racing if TRL_GRID.get(name) and name not in lost]
            best = min(tuned, key=lambda name: statistics.median(turns[name][0]["seconds"]), default=None)
            for name in tuned:
                if name != best:
                    racers[name].stop()
                    racing.remove(name)
    return {name: own for name, own in turns.items() if own}


def _facts(folder: Path, case: Case, settings: Settings) -> dict[str, Any]:
    """Tokens and useful FLOPs of the mean step."""
    race = read_race(folder)
    store, num_steps = race.store, race.windows.num_steps
    lengths = store.num_tokens.astype(float)
    tokens, targets = lengths.sum() / num_steps, store.num_supervised.sum() / num_steps
    steps = []
    for step in range(1, settings.num_steps + 1):
        ids = race.windows.example_ids(step)
        own = lengths[ids].sum(), float(store.num_supervised[ids].sum()), (lengths[ids] ** 2).sum()
        steps.append((own[0], own[1], step_flops(race.shape, case.lora, *own, race.config)))
    return {
        "steps": steps,
        "tokens_per_step": tokens,
        "supervised_tokens_per_step": targets,
        "supervised_share": targets / tokens,
        "mean_document_tokens": lengths.mean(),
        "parameters": race.shape.num_params,
        "rounds": settings.num_rounds,
        "timed_steps_per_turn": settings.steps,
        "untimed_steps_per_turn": settings.warmup,
    }


def step_flops(
    shape: ModelShape, lora: bool, tokens: float, targets: float, squares: float, config: Any
) -> float:
    """Useful FLOPs: no recomputation, no padding, the head on supervised rows, causal pairs in documents.

    A matrix costs its product once forward and once backward for its input, and once more where it is
    trained.
    """
    passes = 2 if lora else 3
    matrices = 2.0 * shape.active_layer_weights * tokens * passes
    head = 2.0 * shape.embedding_params * targets * passes
    attention = 2.0 * shape.num_layers * shape.query_size * squares * 3
    adapter = 6.0 * shape.lora_params(config.adapter) * tokens if lora else 0.0
    return matrices + head + attention + adapter


def _summary(
    turns: Mapping[str, list[dict[str, Any]]],
    ready: Mapping[str, dict[str, Any]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    rates = []
    for turn in turns.get("matrix", []):
        flops = ready["matrix"]["flops"]
        # Steps alternate between the shapes, and the first ones were not timed.
        first = facts["untimed_steps_per_turn"]
        rates.append(max(10 * flops[(first + i) % len(flops)] / s for i, s in enumerate(turn["seconds"])))
    medians = {n: [statistics.median(t["seconds"]) for t in own] for n, own in turns.items() if n != "matrix"}
    own = medians["burnish"]
    racers = {}
    for name, seconds in medians.items():
        last = turns[name][-1]
        work = [_work_per_second(own, facts, number) for number, own in enumerate(turns[name])]
        mfu = [done[2] / rate for done, rate in zip(work, rates, strict=False)]
        racers[name] = {
            "ratio": _spread([s / o for s, o in zip(seconds, own, strict=False)]),
            "rounds": len(seconds),
            "seconds": _spread(seconds),
            "supervised_tokens_per_second": statistics.median(done[1] for done in work),
            "tokens_per_second": statistics.median(done[0] for done in work),
            "mfu": statistics.median(mfu) if mfu else None,
            "peak_over_model_bytes": last["peak_bytes"] - ready[name]["bytes"],
            "first_loss": turns[name][0].get("first_loss"),
            "settings": ready[name].get("settings"),
            "phases": last.get("phases"),
        }
    return {"matrix_flops_per_second": _spread(rates) if rates else None, "racers": racers}


def _work_per_second(turn: Mapping[str, Any], facts: Mapping[str, Any], number: int) -> list[float]:
    """Tokens, supervised tokens and useful FLOPs a second in one turn, of the very steps that it timed."""
    size = facts["timed_steps_per_turn"]
    untimed = facts["untimed_steps_per_turn"]
    first = number * (untimed + size) + untimed  # the steps of each turn are numbered on
    timed = facts["steps"][first : first + size]
    return [sum(step[kind] for step in timed) / sum(turn["seconds"]) for kind in range(3)]


def _tell(what: str) -> None:
    """How far it has come, for who waits or has stopped it."""
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
