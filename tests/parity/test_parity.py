"""The comparison with the peers: its parts that need no environment of theirs, and TRL's in ten steps."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
PAGE = BENCH.parent / "docs" / "parity.md"


@pytest.fixture(scope="module", autouse=True)
def _bench_on_the_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def load(path):
    """A module by its file: its name may be another's on the path."""
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_padding_and_unpadding_are_each_others_inverse():
    pytest.importorskip("einops")
    padding = load(BENCH / "parity_peers/stubs/flash_attn/bert_padding.py")
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    hidden = torch.randn(3, 4, 2) * mask[:, :, None]
    tokens, indices, starts, longest, lengths = padding.unpad_input(hidden, mask)
    assert tokens.shape == (8, 2) and longest == 4
    assert starts.tolist() == [0, 3, 4, 8] and lengths.tolist() == [3, 1, 4]
    assert torch.equal(tokens[3], hidden[1, 0])
    assert torch.equal(padding.pad_input(tokens, indices, 3, 4), hidden)


def test_a_file_is_laid_out_so_that_their_shuffle_gives_our_order():
    from parity_peers.job import SEED
    from parity_peers.peers import openrlhf_file_order

    rows = [{"row": i} for i in range(17)]
    file = openrlhf_file_order(rows)
    # What openrlhf.utils.distributed_sampler takes in epoch 0, one rank.
    taken = torch.randperm(17, generator=torch.Generator().manual_seed(SEED + 0)).tolist()
    assert [file[i] for i in taken] == rows and file != rows


def test_a_curve_that_is_no_number_is_no_parity():
    parity = load(BENCH / "parity_peers/curves.py")
    assert parity.largest_difference([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert parity.largest_difference([1.0, math.nan], [1.0, math.nan]) == math.inf
    with pytest.raises(ValueError):
        parity.largest_difference([1.0, 2.0], [1.0])


def test_the_page_says_what_the_newest_result_says(tmp_path):
    from parity_peers.page import write_page

    newest = max((BENCH / "results").glob("*-parity.json"))
    copy = tmp_path / "parity.md"
    copy.write_text(PAGE.read_text("utf-8"), "utf-8")
    write_page(copy, json.loads(newest.read_text("utf-8")))
    assert copy.read_text("utf-8") == PAGE.read_text("utf-8"), f"write it anew from {newest.name}"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_ten_steps_are_those_of_trl(tmp_path, lora):
    pytest.importorskip("trl")
    from parity_peers.job import PLAIN, make_job, our_config, train_ours
    from parity_peers.peers import Peers

    data, curves = load(BENCH / "data_path/rows.py"), load(BENCH / "parity_peers/curves.py")
    rows = data.made_up_rows(400)
    job = make_job(tmp_path / "job", rows, data.tokenizer_for(None, rows), num_steps=10)
    setting = PLAIN.with_lora() if lora else PLAIN
    ours = train_ours(job, "ours", our_config(job, setting, tmp_path / "ours"))
    theirs = Peers(openrlhf=None).train("TRL", job, setting)
    assert ours["loss"][-1] < ours["loss"][0] - 0.01
    assert curves.largest_difference(ours["loss"], theirs["loss"]) < 1e-5
    assert curves.weights_apart(job, setting, ours["final"], theirs["final"]) < 1e-3
