"""The protocol of checkpoints: whole or not there, verified before use, never a silent restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from burnish.checkpoint import commit
from burnish.checkpoint.commit import save_checkpoint
from burnish.checkpoint.fingerprints import changed_settings, fingerprints, require_same
from burnish.checkpoint.lock import LOCK_NAME, only_run
from burnish.checkpoint.manifest import FOLDER, checkpoint_path, committed_paths, verify
from burnish.checkpoint.resume import clear_the_way, find_checkpoint, load_checkpoint, with_its_engine
from burnish.checkpoint.retention import list_checkpoints, prune, prune_verified
from burnish.config.load import dump_config, load_config
from burnish.config.schema import Config, ResumableChange
from burnish.engine.base import Engine, StepResult
from burnish.engine.ds_checkpoint import TAG
from burnish.engine.local import WEIGHTS_FILE
from burnish.engine.state_files import write_tensors
from burnish.errors import BusyError, CheckpointError, ConfigError, MachineError
from burnish.records import MicroBatch, TrainState
from burnish.run import train
from burnish.runtime import Ranks
from cluster.tiny_job import write_tiny_job

ALONE = Ranks(0, 0, 1)


class OneNumber(Engine):
    """An engine whose whole state is one number, in two files."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward_backward(self, micro_batch: MicroBatch, total_weight: float) -> torch.Tensor:
        raise NotImplementedError

    def rehearse(self, micro_batch: MicroBatch) -> None:
        raise NotImplementedError

    def step(self, lr: float) -> StepResult:
        raise NotImplementedError

    def evaluate(self, micro_batch: MicroBatch) -> torch.Tensor:
        raise NotImplementedError

    def save_state(self, folder: Path) -> Sequence[Path]:
        (folder / "deep").mkdir()
        files = [folder / "number.json", folder / "deep" / "again.json"]
        for path in files:
            path.write_text(json.dumps(self.number))
        return files

    def load_state(self, folder: Path) -> None:
        self.number = json.loads((folder / "deep" / "again.json").read_text())

    def export_state(self) -> dict[str, torch.Tensor] | None:
        return None


def state_at(step: int, best: int | None = None, data: str = "abc") -> TrainState:
    return TrainState(
        step=step,
        epoch=0,
        num_examples=step,
        num_tokens=step,
        num_supervised_tokens=step,
        best_eval_loss=None if best is None else 1.5,
        best_eval_step=best,
        num_skipped_in_a_row=0,
        rng={},
        fingerprints={"data": data},
        versions={},
        world_size=1,
    )


def save(run_dir: Path, step: int, best: int | None = None) -> Path:
    return save_checkpoint(OneNumber(step), state_at(step, best), run_dir, ALONE)


def test_who_goes_on_has_the_engine_of_the_newest_checkpoint(tmp_path: Path) -> None:
    """Whatever `auto` is for as many processes as there are now."""

    def kind(**engine: object) -> str:
        settings = {"engine": engine, "checkpoint": {"resume": resume}, "output_dir": str(tmp_path)}
        given = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "launch": {"num_processes": 2}}
        return with_its_engine(Config.model_validate(given | settings)).engine.kind

    resume = "auto"
    assert kind() == "auto", "nothing to go on from"
    (save(tmp_path, 1) / "engine" / TAG).mkdir()
    local = save(tmp_path, 2)
    (local / "engine" / WEIGHTS_FILE).touch()
    save(tmp_path, 3)  # its weights are lost: the run goes on from the one before
    assert kind() == "local"
    assert kind(kind="deepspeed") == "deepspeed"
    assert kind(offload_optimizer="cpu") == "auto", "which the local engine does not do: loading says so"
    resume = str(tmp_path / "checkpoints" / "step-00000001")
    assert kind() == "deepspeed"
    resume = "never"
    assert kind() == "auto"


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    # Not Python's own random: beartype draws from it to pick what it checks.
    drawn = (np.random.random(), torch.rand(3))
    assert path == checkpoint_path(tmp_path, 7)
    assert verify(path) == []
    assert sorted(p.name for p in path.iterdir()) == ["MANIFEST.json", "engine", "state.json"]
    assert [p.name for p in (tmp_path / FOLDER).iterdir()] == ["step-00000007"]
    engine = OneNumber()
    found = find_checkpoint(tmp_path, "auto", ALONE)
    assert found == path
    state = load_checkpoint(path, engine, ALONE, {"data": "abc"})
    assert (engine.number, state.step) == (7, 7)
    again = (np.random.random(), torch.rand(3))
    assert drawn[0] == again[0]
    assert torch.equal(drawn[1], again[1])


def test_one_run_at_a_time(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with only_run(tmp_path, ALONE):
        for other in (lambda: only_run(tmp_path, ALONE).__enter__(), lambda: prune_verified(tmp_path, 1)):
            with pytest.raises(BusyError, match=rf"process {os.getpid()} on") as caught:
                other()
            assert caught.value.exit_code == 75
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_second_run_is_refused_before_it_takes_memory_or_swap_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same GPU the first would run out of memory; on the same disk they would swap into one file."""
    config = load_config(write_tiny_job(tmp_path), [])
    monkeypatch.setattr("burnish.run.build_model", lambda *_, **__: pytest.fail("a model was built"))
    with only_run(Path(config.output_dir), ALONE), pytest.raises(BusyError):
        train(config)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from burnish.checkpoint.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / LOCK_NAME).exists()
    with only_run(tmp_path, ALONE):
        pass


def test_ranks_that_see_other_data_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"data": '"abc"', "train.seed": "1"}
    theirs = {"data": '"abd"', "train.seed": "1"}
    require_same(mine, ALONE)
    seen = [("hosta", mine), ("hostb", theirs)]
    monkeypatch.setattr("burnish.checkpoint.fingerprints.gather_objects", lambda *_: seen)
    with pytest.raises(MachineError, match="rank 1 on hostb: would train on something else") as caught:
        require_same(theirs, Ranks(1, 1, 2))
    assert [problem.where for problem in caught.value.problems[1:]] == ["data"]
    assert caught.value.everywhere


def go_on(run_dir: Path, resume: str) -> Path | None:
    """Choose a checkpoint and take its course."""
    chosen = find_checkpoint(run_dir, resume, ALONE)
    clear_the_way(run_dir, chosen, ALONE)
    return chosen


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("engine/number.json", "flip", "damaged"),
        ("engine/deep/again.json", "cut", "bytes instead of"),
        ("engine/number.json", "remove", "cannot be read"),
        ("state.json", "flip", "damaged"),
        ("MANIFEST.json", "remove", "never finished"),
        ("MANIFEST.json", "cut", "cannot be read"),
    ],
)
def test_damage_is_found_and_the_one_before_is_taken(
    tmp_path: Path, name: str, damage: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    target = newest / name
    if damage == "flip":
        flip_byte(target)
    elif damage == "cut":
        target.write_bytes(target.read_bytes()[:-1] if name != "MANIFEST.json" else b'{"version"')
    else:
        target.unlink()
    assert says in " ".join(verify(newest))
    assert go_on(tmp_path, "auto") == checkpoint_path(tmp_path, 1)
    # The damaged one is kept, but where no later resume or prune mistakes it for the newest.
    assert [p.name for p in committed_paths(tmp_path)] == ["step-00000001"]
    assert (tmp_path / FOLDER / "set-aside" / "step-00000002").is_dir()


def test_never_a_silent_restart(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "auto", ALONE) is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        find_checkpoint(tmp_path, "must", ALONE)
    with pytest.raises(CheckpointError, match="elsewhere"):
        find_checkpoint(tmp_path, str(tmp_path / "elsewhere"), ALONE)
    flip_byte(save(tmp_path, 1) / "engine" / "number.json")
    with pytest.raises(CheckpointError, match="the only checkpoint is not whole"):
        find_checkpoint(tmp_path, "auto", ALONE)
    assert committed_paths(tmp_path) == [checkpoint_path(tmp_path, 1)]


def test_resume_never_keeps_the_old_ones_out_of_the_way(tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert go_on(tmp_path, "never") is None
    assert committed_paths(tmp_path) == []
    save(tmp_path, 3)
    assert go_on(tmp_path, "never") is None
    aside = sorted(p.name for p in (tmp_path / FOLDER / "set-aside").iterdir())
    assert aside == ["step-00000003", "step-00000003-2"]


def test_resume_from_a_path_gives_up_what_came_after(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    chosen = checkpoint_path(tmp_path, 2)
    assert go_on(tmp_path, str(chosen)) == chosen
    assert committed_paths(tmp_path) == [chosen, checkpoint_path(tmp_path, 1)]


def test_a_link_to_a_checkpoint_is_that_checkpoint(tmp_path: Path) -> None:
    """A link's own name says no step, and it may lie anywhere; nor need a checkpoint lie in its run."""
    for step in (1, 2, 3):
        save(tmp_path / "run", step)
    chosen = checkpoint_path(tmp_path / "run", 2)
    (tmp_path / "latest").symlink_to(chosen)
    assert go_on(tmp_path / "run", str(tmp_path / "latest")) == chosen
    assert committed_paths(tmp_path / "run") == [chosen, checkpoint_path(tmp_path / "run", 1)]
    chosen.rename(tmp_path / "large-disk")
    chosen.symlink_to(tmp_path / "large-disk")
    assert go_on(tmp_path / "run", "auto") == chosen
    assert committed_paths(tmp_path / "run") == [chosen, checkpoint_path(tmp_path / "run", 1)]


def test_what_a_save_that_died_left_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / FOLDER / ".staging-step-00000002").mkdir()
    go_on(tmp_path, "auto")
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("resume", ["never", "elsewhere"])
def test_an_earlier_runs_best_is_moved_by_a_run_that_does_not_go_on_from_it(
    tmp_path: Path, resume: str
) -> None:
    run_dir, elsewhere = tmp_path / "run", save(tmp_path / "other", 2)
    save(run_dir, 2, best=1)
    (run_dir / "best").mkdir()
    (run_dir / "best" / "whose").write_text("an earlier run's")
    (run_dir / "best-1").mkdir()
    for own in ("auto", str(checkpoint_path(run_dir, 2))):
        go_on(run_dir, own)
        assert (run_dir / "best").is_dir()
    go_on(run_dir, "never" if resume == "never" else str(elsewhere))
    assert not (run_dir / "best").exists()
    assert (run_dir / "best-2" / "whose").read_text() == "an earlier run's"


def test_a_run_that_ends_before_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    engine = OneNumber()
    with pytest.raises(CheckpointError, match=r"stands at step 3, but the run asked for .* ends at 2"):
        load_checkpoint(path, engine, ALONE, {"data": "abc"}, num_steps=2)
    assert engine.number == 0
    assert load_checkpoint(path, engine, ALONE, {"data": "abc"}, num_steps=3).step == 3


def test_other_run_is_refused_with_what_changed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    engine = OneNumber()
    now = {"data": "xyz", "template": "new"}
    with pytest.raises(CheckpointError, match="data: was abc, is xyz") as caught:
        load_checkpoint(path, engine, ALONE, now)
    assert "template: was absent, is new" in str(caught.value)
    assert engine.number == 0
    state = load_checkpoint(path, engine, ALONE, now, allowed_changes=["data", "template"])
    assert (engine.number, dict(state.fingerprints)) == (1, now)


def test_the_refusal_says_how_to_allow_what_can_be_allowed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"checkpoint.allow_changes: \[data\]"):
        load_checkpoint(path, OneNumber(), ALONE, {"data": "xyz"})
    with pytest.raises(CheckpointError) as caught:  # another optimizer's state cannot be taken over
        load_checkpoint(path, OneNumber(), ALONE, {"data": "xyz", "optim.name": "muon"})
    assert "allow_changes" not in str(caught.value)


def test_every_change_that_can_be_allowed_is_a_fingerprint() -> None:
    config = Config.model_validate(
        {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "out"}
    )
    assert set(get_args(ResumableChange)) <= fingerprints(config, "tokens", "template", "hash").keys()


def test_fresh_weights_are_not_gone_on_with_as_pretrained_ones() -> None:
    """As after a trial of the pipes with `model.init: random` in the same folder."""
    values = {"data": {"train": "d.jsonl"}, "output_dir": "out"}
    fresh, pretrained = (
        fingerprints(Config.model_validate({**values, "model": {"path": "m", "init": init}}), "t", None, "h")
        for init in ("random", "pretrained")
    )
    assert fresh != pretrained


def test_the_order_of_parts_is_a_fingerprint_and_their_factors_are_not() -> None:
    def of(**group_lr: float) -> object:
        values = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "out"}
        config = Config.model_validate({**values, "optim": {"group_lr": group_lr}})
        return fingerprints(config, "tokens", "template", "hash")

    assert of(embed_tokens=0.5, lm_head=2.0) == of(embed_tokens=2.0, lm_head=0.5)
    assert of(embed_tokens=0.5, lm_head=2.0) != of(lm_head=2.0, embed_tokens=0.5)


def test_the_adapter_to_begin_with_is_told_by_its_content(tmp_path: Path) -> None:
    def of(**adapter: object) -> Mapping[str, str]:
        values = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "out"}
        return fingerprints(Config.model_validate({**values, "adapter": adapter}), "t", None, "h")

    for name, content in (("one", b"abc"), ("moved", b"abc"), ("other", b"abd")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
    assert "adapter.path" not in of() and "path" not in json.loads(of()["adapter"])  # as in older checkpoints
    one, moved, other = (of(path=str(tmp_path / name)) for name in ("one", "moved", "other"))
    assert one == moved
    assert {name for name in one if one[name] != other[name]} == {"adapter.path"}


def test_a_changed_rate_is_told(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "out"}
    before = Config.model_validate({**values, "optim": {"weight_decay": 0.1}, "schedule": {"name": "wsd"}})
    changed = {"optim": {"betas": [0.9, 0.99]}, "train": {"epochs": 2, "seed": 1}}
    now = Config.model_validate({**values, **changed})
    path = save(tmp_path, 1)
    assert "cannot be read" in changed_settings(path, now)[0]
    (tmp_path / "config.yaml").write_text(dump_config(before))
    assert changed_settings(path, before) == []
    assert changed_settings(path, now) == [
        "optim.betas: [0.9, 0.95] before, [0.9, 0.99] now",
        "optim.weight_decay: 0.1 before, 0.0 now",
        'schedule.name: "wsd" before, "cosine" now',
        "train.epochs: 1.0 before, 2.0 now",
    ]
    (tmp_path / "config.yaml").write_text("optim: fast")
    assert changed_settings(path, now) == []


def test_prune_keeps_newest_best_and_protected(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, best=2 if step >= 2 else None)
    (tmp_path / FOLDER / ".staging-step-00000008").mkdir()
    prune(tmp_path, 2, [checkpoint_path(tmp_path, 4)])
    assert [p.name[-1] for p in committed_paths(tmp_path)] == ["7", "6", "4", "2"]
    assert not (tmp_path / FOLDER / ".staging-step-00000008").exists()


def test_damaged_newer_ones_do_not_push_out_the_last_whole_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_byte(checkpoint_path(tmp_path, 3) / "engine" / "number.json")
    (checkpoint_path(tmp_path, 2) / "MANIFEST.json").unlink()
    prune_verified(tmp_path, 1)
    assert checkpoint_path(tmp_path, 1) in committed_paths(tmp_path)


def test_a_mistyped_folder_or_number_is_told(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for folder, keep in ((tmp_path / "elsewhere", 2), (tmp_path, 0)):
        with pytest.raises(ConfigError, match="no such folder" if keep else "at least 1"):
            prune_verified(folder, keep)
    assert len(committed_paths(tmp_path)) == 1


def test_list(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    flip_byte(checkpoint_path(tmp_path, 2) / "engine" / "number.json")
    listed = list_checkpoints(tmp_path)
    assert [(c.step, c.problems, c.world_size) for c in listed] == [(2, (), 1), (1, (), 1)]
    verified = list_checkpoints(tmp_path, verify_bytes=True)
    assert [bool(c.problems) for c in verified] == [True, False]


def test_file_that_no_rank_claims_fails_the_save(tmp_path: Path) -> None:
    class Careless(OneNumber):
        def save_state(self, folder: Path) -> Sequence[Path]:
            return super().save_state(folder)[:1]

    with pytest.raises(CheckpointError, match=r"again\.json"):
        save_checkpoint(Careless(), state_at(1), tmp_path, ALONE)
    assert committed_paths(tmp_path) == []


def test_a_full_disk_is_said_by_whoever_writes(tmp_path: Path, small_files: int) -> None:
    """safetensors and torch.save each have an error of their own, and neither is an OSError."""

    class Large(OneNumber):
        def __init__(self, write: Callable[[Path, dict[str, torch.Tensor]], None]) -> None:
            super().__init__()
            self.write = write

        def save_state(self, folder: Path) -> Sequence[Path]:
            self.write(folder / "large", {"a": torch.zeros(small_files)})
            return [folder / "large"]

    for write in (write_tensors, lambda path, tensors: torch.save(tensors, path)):
        with pytest.raises(CheckpointError, match="could not be written: rank 0: "):
            save_checkpoint(Large(write), state_at(1), tmp_path, ALONE)
    assert list((tmp_path / FOLDER).iterdir()) == [], "a full disk gets its room back"


@pytest.mark.parametrize("resaved", [False, True])
def test_a_save_that_dies_anywhere_leaves_the_one_before(
    tmp_path: Path, resaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die at every call that touches the disk in turn: the newest whole one is always there."""
    calls = {"left": -1}

    class DiedError(BaseException):
        pass

    def dying(real):
        def call(*args, **kwargs):
            if calls["left"] == 0:
                raise DiedError
            calls["left"] -= 1
            return real(*args, **kwargs)

        return call

    for name in ("fsync_path", "fsync_folders", "write_manifest", "write_state", "hash_file"):
        monkeypatch.setattr(commit, name, dying(getattr(commit, name)))
    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    save(tmp_path, 1)
    if resaved:
        save(tmp_path, 2)
    died = 0
    for moment in range(40):
        calls["left"] = moment
        try:
            save(tmp_path, 2)
        except DiedError:
            died += 1
            whole = [p for p in committed_paths(tmp_path) if not verify(p)]
            assert checkpoint_path(tmp_path, 1) in whole
            assert len(whole) == len(committed_paths(tmp_path))
        else:
            break
    assert died > 8
    assert verify(checkpoint_path(tmp_path, 2)) == []


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path, 1)
