"""The same run on one process and on two, under every engine: real DeepSpeed over gloo.

Two groups of two processes run everything, because importing deepspeed takes longer than training
the toy; the tests then look at what they found.
"""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest

from burnish.checkpoint.manifest import committed_paths, verify
from burnish.runtime import Ranks
from rig.runs import run_case
from rig.spawn import run_cases, try_cases

ALONE = Ranks(0, 0, 1)
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
ENGINES: dict[str, dict[str, Any]] = {
    "local": {"engine.kind": "local"},
    **{f"zero{stage}": {"engine.kind": "deepspeed", "engine.zero_stage": stage} for stage in range(4)},
}
CUTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded-4x": {"data.packing": "off", "batch.micro_tokens": 256},
    "packed-4x": {"batch.micro_tokens": 256},
}
ONE_IDEA = [(engine, cut) for engine in ENGINES for cut in CUTS if cut != "packed-4x" or engine == "local"]
FP32_VARIANTS = [
    *((engine, "lora") for engine in ENGINES),
    *((engine, "tied") for engine in ("zero0", "zero3")),
    *((engine, "lora-fa") for engine in ("zero2", "zero3")),
    *((engine, "no-clip") for engine in ("local", "zero0", "zero2")),
]
BF16_VARIANTS = [(engine, variant) for engine in ENGINES for variant in ("bf16", "bf16-lora")]
OFFLOADED = {
    f"zero{stage}-offloaded": {**ENGINES[f"zero{stage}"], "engine.offload_optimizer": "cpu"}
    for stage in (1, 2, 3)
}
MASTERED = {**{engine: ENGINES[engine] for engine in ("zero1", "zero2", "zero3")}, **OFFLOADED}
MASTERS = [(engine, is_loaded) for engine in MASTERED for is_loaded in (False, True)]
POISONED = [(engine, "fp32") for engine in ENGINES]
POISONED += [(f"zero{stage}", "bf16") for stage in (1, 2, 3)] + [(engine, "bf16") for engine in OFFLOADED]
STOPPED = ("local", "zero3")
SHRUNK = ("local", "zero3")
SIGNALLED = ("local", "zero0", "zero1", "zero3")
VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "tied": {},
    "lora": {"adapter": LORA},
    "lora-fa": {"adapter": LORA, "model.freeze": ["lora_A"]},
    "bf16": {"model.dtype": "bf16"},
    "bf16-lora": {"model.dtype": "bf16", "adapter": LORA},
    "no-clip": {"optim.max_grad_norm": None},
}
RESUMABLE = {"checkpoint.every_steps": 2, "checkpoint.resume": "auto"}
SIGNALLED_SETTINGS = {"checkpoint.resume": "auto", "adapter": LORA}
KILLED = {**RESUMABLE, **ENGINES["zero2"]}
STOPPED_SETTINGS = {"checkpoint.resume": "auto", "train.max_steps": 9}


def _first_cases() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for engine, cut in ONE_IDEA:
        settings = {**ENGINES[engine], **CUTS[cut]}
        cases[f"{engine}-{cut}"] = {"kind": "plain", "settings": settings, "evaluate": cut != "packed-4x"}
    for engine, variant in FP32_VARIANTS + BF16_VARIANTS:
        settings = {**ENGINES[engine], **VARIANTS[variant]}
        cases[f"{engine}-{variant}"] = {"kind": "plain", "settings": settings, "tied": variant == "tied"}
    for engine, dtype in POISONED:
        settings = {**(ENGINES | OFFLOADED)[engine], "model.dtype": dtype}
        cases[f"{engine}-poisoned-{dtype}"] = {
            "kind": "poisoned",
            "settings": settings,
            "steps": {2: "nan", 3: 0.0},
        }
    for engine in STOPPED:
        settings = {**ENGINES[engine], **STOPPED_SETTINGS}
        steps = dict.fromkeys(range(4, 10), "nan")
        cases[f"{engine}-stopped"] = {"kind": "poisoned", "settings": settings, "steps": steps}
    for engine in SIGNALLED:
        settings = {**ENGINES[engine], **SIGNALLED_SETTINGS}
        number = int(signal.SIGTERM)
        cases[f"{engine}-signalled"] = {
            "kind": "signalled",
            "settings": settings,
            "at_step": 3,
            "signal": number,
        }
    for dtype in ("fp32", "bf16"):
        settings = {**ENGINES["zero3"], "model.dtype": dtype}
        cases[f"zero3-loaded-{dtype}"] = {"kind": "loaded", "settings": settings}
    for engine, is_loaded in MASTERS:
        settings = {**MASTERED[engine], "model.dtype": "bf16"}
        cases[f"{engine}-masters-{is_loaded}"] = {
            "kind": "masters",
            "settings": settings,
            "loaded": is_loaded,
        }
    for engine in SHRUNK:
        cases[f"{engine}-before"] = {
            "kind": "signalled",
            "settings": {**ENGINES[engine], "checkpoint.resume": "auto"},
            "at_step": 3,
            "signal": int(signal.SIGTERM),
        }
    # The last one: it kills a worker.
    cases["killed"] = {"kind": "signalled", "settings": KILLED, "at_step": 5, "signal": int(signal.SIGKILL)}
    return cases


def _second_cases() -> dict[str, Any]:
    cases: dict[str, Any] = {"resumed": {"kind": "plain", "folder": "killed", "settings": KILLED}}
    for engine in SIGNALLED:
        settings = {**ENGINES[engine], **SIGNALLED_SETTINGS}
        cases[f"{engine}-went-on"] = {
            "kind": "plain",
            "folder": f"{engine}-signalled",
            "settings": settings,
        }
    for engine in STOPPED:
        settings = {**ENGINES[engine], **STOPPED_SETTINGS, "checkpoint.resume": "must"}
        cases[f"{engine}-recovered"] = {
            "kind": "plain",
            "folder": f"{engine}-stopped",
            "settings": settings,
        }
        settings = {**ENGINES[engine], **STOPPED_SETTINGS}
        cases[f"{engine}-9-steps"] = {"kind": "plain", "settings": settings}
    return cases


def _cases_of_one_process() -> dict[str, Any]:
    cases: dict[str, Any] = {
        f"{engine}-shrunk": {
            "kind": "plain",
            "folder": f"{engine}-before",
            "settings": {**ENGINES[engine], "checkpoint.resume": "must"},
        }
        for engine in SHRUNK
    }
    cases["zero2-alone"] = {"kind": "plain", "settings": ENGINES["zero2"]}
    settings = {**ENGINES["local"], **RESUMABLE}
    cases["local-killed"] = {
        "kind": "signalled",
        "settings": settings,
        "at_step": 5,
        "signal": int(signal.SIGKILL),
    }
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def first(folder: Path) -> dict[str, Any]:
    """What two processes found, until one was killed."""
    code, results = try_cases(_first_cases(), folder, 2)
    assert code == 128 + signal.SIGKILL
    assert set(results) == set(_first_cases()) - {"killed"}
    return results


@pytest.fixture(scope="module")
def second(first: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a new group of two processes found in the folders that the first had left."""
    return run_cases(_second_cases(), folder, 2)


@pytest.fixture(scope="module")
def one_process(first: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What one process found, in folders of its own and of two processes, until it was killed."""
    code, results = try_cases(_cases_of_one_process(), folder, 1)
    assert code == 128 + signal.SIGKILL
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, plain PyTorch: what every other run must agree with."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: run_case(s, ALONE, folder / name, evaluate=name == "packed", tied=name == "tied")
        for name, s in VARIANTS.items()
    }


@pytest.mark.parametrize(("engine", "cut"), ONE_IDEA)
def test_one_idea(engine: str, cut: str, first: dict[str, Any], alone: dict[str, Any]) -> None:
    """Ranks, engine, packing and budget move nothing: not the examples, the loss or the norm."""
    result, reference = first[f"{engine}-{cut}"], alone["packed"]
    assert len(result["losses"]) == 6
    assert result["example_ids"] == reference["example_ids"]
    assert result["losses"] == pytest.approx(reference["losses"], rel=2e-5)
    assert result["norms"] == pytest.approx(reference["norms"], rel=2e-5)
    if cut == "packed-4x":
        return
    assert [e[0] for e in result["evals"]] == [0, 6]
    for ours, theirs in zip(result["evals"], reference["evals"], strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=2e-5)
        assert ours[2] == pytest.approx(theirs[2], rel=2e-5)


def test_cuts_really_differ(first: dict[str, Any], alone: dict[str, Any]) -> None:
    assert max(alone["packed"]["micro_batches"]) >= 4
    assert first["local-packed"]["micro_batches"] != alone["packed"]["micro_batches"]
    assert max(first["local-packed-4x"]["micro_batches"]) == 1
    assert max(first["zero3-packed"]["micro_batches"]) > 1


@pytest.mark.parametrize(("engine", "variant"), FP32_VARIANTS)
def test_variants_in_fp32(engine: str, variant: str, first: dict[str, Any], alone: dict[str, Any]) -> None:
    result, reference = first[f"{engine}-{variant}"], alone[variant]
    assert result["losses"] == pytest.approx(reference["losses"], rel=2e-5)
    assert result["norms"] == pytest.approx(reference["norms"], rel=2e-5)
    assert result["shapes"] == reference["shapes"]


@pytest.mark.parametrize(("engine", "variant"), BF16_VARIANTS)
def test_variants_in_bf16(engine: str, variant: str, first: dict[str, Any], alone: dict[str, Any]) -> None:
    """bf16 keeps 8 bits: losses agree to 1 %, norms of this tiny model to 5 %."""
    result, reference = first[f"{engine}-{variant}"], alone[variant]
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-2)
    assert result["norms"] == pytest.approx(reference["norms"], rel=5e-2)
    assert result["shapes"] == reference["shapes"]


@pytest.mark.parametrize(("engine", "dtype"), POISONED)
def test_not_finite_is_skipped_by_all(engine: str, dtype: str, first: dict[str, Any]) -> None:
    """NaN, then infinity, on one of two ranks: nobody's weights move, and the run goes on."""
    result = first[f"{engine}-poisoned-{dtype}"]
    assert result["error"] is None
    assert result["applied"] == [True, False, False, True, True, True]
    hashes = result["hashes"]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]
    assert all(math.isfinite(norm) for norm in result["norms"][3:])
    skipped = [e for e in result["events"] if e["kind"] == "skipped"]
    assert [e["example_ids"] for e in skipped] == result["example_ids"][1:3]


@pytest.mark.parametrize("engine", STOPPED)
def test_stops_itself_with_a_checkpoint_from_before(
    engine: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    stopped = first[f"{engine}-stopped"]
    assert (stopped["error"], stopped["exit_code"]) == ("TrainingStoppedError", 5)
    assert stopped["applied"] == [True] * 3 + [False] * 3
    whole = second[f"{engine}-9-steps"]
    recovered = second[f"{engine}-recovered"]
    assert recovered["losses"] == whole["losses"][3:]
    assert recovered["hash"] == whole["hash"]


@pytest.mark.parametrize("engine", SIGNALLED)
def test_signal_saves_and_the_next_run_goes_on(
    engine: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """One rank gets the signal, all stop after the same step; with LoRA, to the bit."""
    stopped = first[f"{engine}-signalled"]
    assert (stopped["error"], stopped["exit_code"]) == ("InterruptedRunError", 143)
    done = len(stopped["losses"])
    assert done == 4
    uninterrupted, went_on = first[f"{engine}-lora"], second[f"{engine}-went-on"]
    assert stopped["losses"] + went_on["losses"] == uninterrupted["losses"]
    assert went_on["hash"] == uninterrupted["hash"]


def test_killed_run_resumes_to_the_bit(first: dict[str, Any], second: dict[str, Any], folder: Path) -> None:
    uninterrupted, resumed = first["zero2-packed"], second["resumed"]
    assert resumed["events"][0]["kind"] == "resume"
    assert resumed["losses"] == uninterrupted["losses"][4:]
    assert resumed["hash"] == uninterrupted["hash"]
    newest = committed_paths(folder / "killed")[0]
    assert newest.name == "step-00000006"
    assert verify(newest) == []


def test_killed_local_run_resumes_to_the_bit(
    one_process: dict[str, Any], alone: dict[str, Any], folder: Path
) -> None:
    assert "local-killed" not in one_process
    resumed = run_case({**ENGINES["local"], **RESUMABLE}, ALONE, folder / "local-killed")
    assert resumed["losses"] == alone["packed"]["losses"][4:]
    assert resumed["hash"] == alone["packed"]["hash"]


@pytest.mark.parametrize("engine", SHRUNK)
def test_two_processes_then_one(
    engine: str, first: dict[str, Any], one_process: dict[str, Any], alone: dict[str, Any]
) -> None:
    before, after = first[f"{engine}-before"], one_process[f"{engine}-shrunk"]
    assert before["losses"] + after["losses"] == pytest.approx(alone["packed"]["losses"], rel=2e-5)
    assert before["norms"] + after["norms"] == pytest.approx(alone["packed"]["norms"], rel=2e-5)
    assert before["example_ids"] + after["example_ids"] == alone["packed"]["example_ids"]


def test_deepspeed_on_one_process(one_process: dict[str, Any], alone: dict[str, Any]) -> None:
    assert one_process["zero2-alone"]["losses"] == pytest.approx(alone["packed"]["losses"], rel=2e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 2e-5), ("bf16", 1e-2)])
def test_loaded_partitioned(dtype: str, bound: float, first: dict[str, Any], alone: dict[str, Any]) -> None:
    """A pretrained model is partitioned while it is loaded, and is the same model."""
    result = first[f"zero3-loaded-{dtype}"]
    assert result["partitioned"]
    assert result["losses"] == pytest.approx(alone["packed"]["losses"], rel=bound)
    assert result["shapes"] == alone["packed"]["shapes"]


@pytest.mark.parametrize(("engine", "is_loaded"), MASTERS)
def test_masters_are_not_rounded(engine: str, is_loaded: bool, first: dict[str, Any]) -> None:
    """In bf16 too they are the fp32 weights that were loaded or made, to the bit, on two ranks."""
    found = first[f"{engine}-masters-{is_loaded}"]
    assert (found["wrong"], found["forward"]) == ([], ["torch.bfloat16"])


@pytest.mark.slow
def test_offloading_moves_nothing(alone: dict[str, Any], tmp_path: Path) -> None:
    """Optimizer state and weights kept on the CPU's side: the code path of a GPU's offload."""
    cases = {}
    for stage in (1, 2, 3):
        settings = {**ENGINES[f"zero{stage}"], "engine.offload_optimizer": "cpu"}
        if stage == 3:
            settings["engine.offload_params"] = "cpu"
        cases[f"{stage}"] = {"kind": "plain", "settings": settings}
    for result in run_cases(cases, tmp_path, 2).values():
        assert result["losses"] == pytest.approx(alone["packed"]["losses"], rel=2e-5)
        assert result["norms"] == pytest.approx(alone["packed"]["norms"], rel=2e-5)


@pytest.mark.slow
def test_every_stage_shrinks_and_grows(alone: dict[str, Any], tmp_path: Path) -> None:
    """Two processes, then one, then two again; full and LoRA."""
    engines = [(engine, variant) for engine in ENGINES for variant in ("packed", "lora")]

    def cases(first_steps: int | None) -> dict[str, Any]:
        made = {}
        for engine, variant in engines:
            settings = {**ENGINES[engine], **VARIANTS[variant], "checkpoint.resume": "auto"}
            made[f"{engine}-{variant}"] = {
                "kind": "signalled",
                "folder": f"run-{engine}-{variant}",
                "settings": settings,
                "at_step": first_steps,
                "signal": int(signal.SIGTERM),
            }
        return made

    parts = [run_cases(cases(last), tmp_path, n) for last, n in ((1, 2), (3, 1), (None, 2))]
    for engine, variant in engines:
        losses = [loss for part in parts for loss in part[f"{engine}-{variant}"]["losses"]]
        assert losses == pytest.approx(alone[variant]["losses"], rel=2e-5)
