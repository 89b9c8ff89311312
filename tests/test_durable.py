"""Files that are there when they are needed."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from burnish.durable import replace_text, try_writing
from burnish.engine.state_files import write_tensors
from burnish.export.folder import whole_folder
from burnish.model.finished import load_finished


@pytest.fixture(params=[0o022, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "there", tmp_path / "a" / "b" / "c", tmp_path / "there" / "d"):
        try_writing(folder)
    for folder in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("n" * 300), Path("/proc/foo/x")):
        with pytest.raises(OSError, match=r"\[Errno"):
            try_writing(folder)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ("n" * 200)).mkdir()
    with pytest.raises(OSError, match="too long"):
        try_writing(tmp_path / "a" / "new" / ("n" * 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file", "there"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["n" * 200]
    assert list((tmp_path / "there").iterdir()) == []


def test_weights_have_the_mode_of_their_siblings(tmp_path: Path, umask: int) -> None:
    tensors = {"a": torch.zeros(2)}
    write_tensors(tmp_path / "state.safetensors", tensors)
    with whole_folder(tmp_path / "final") as staging:
        (staging / "config.json").write_text("{}")
        save_file(tensors, staging / "model.safetensors")
    for folder in (tmp_path, tmp_path / "final"):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}
        assert len(modes) in (1, 2) and set(modes.values()) == {0o666 & ~umask}, modes


def test_weights_that_may_not_be_read_are_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".safetensors")
    with pytest.raises(PermissionError, match=r"Permission denied: .*model\.safetensors"):
        load_finished(str(tmp_path))


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, small_files: int) -> None:
    file = tmp_path / "config.yaml"
    replace_text(file, "before")
    with pytest.raises(OSError, match="too large"):
        replace_text(file, "a" * 2 * small_files)
    assert file.read_text() == "before"
    replace_text(file, "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.yaml", "after")]
