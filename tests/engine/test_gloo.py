"""Gathering and summing by sends, on three ranks, against torch's own collectives."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from burnish.engine.gloo import _runs, all_gather, sum_at_owners

SIZE = 3


def _rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=SIZE)
    pair = dist.new_group([0, 2])
    for group, members in ((None, range(SIZE)), (pair, (0, 2))):
        if rank not in members:
            continue
        gathers(rank, group, len(members))
        sums(group, len(members))
    dist.barrier()
    dist.destroy_process_group()


def gathers(rank: int, group: dist.ProcessGroup | None, size: int) -> None:
    part = torch.randn(1001, generator=torch.Generator().manual_seed(rank)).bfloat16()
    expected, found, within = (torch.empty(size * 1001, dtype=torch.bfloat16) for _ in range(3))
    dist.all_gather_into_tensor(expected, part, group=group)
    assert all_gather(found, part, group) is None
    assert torch.equal(found, expected)
    own = within.view(size, -1)[dist.get_rank(group)]  # as ZeRO has it: the part lies in the whole
    own.copy_(part)
    on_its_way = all_gather(within, own, group, async_op=True)
    assert on_its_way is not None
    on_its_way.wait()
    assert torch.equal(within, expected)


def sums(group: dist.ProcessGroup | None, size: int) -> None:
    rank = dist.get_rank(group)
    flat = torch.randn(600, generator=torch.Generator().manual_seed(10 + rank))
    before, expected = flat.clone(), flat.clone()
    dist.all_reduce(expected, group=group)
    owners = [0, 0, size - 1, 1, 0, size - 1]  # neighbours of one owner, and owners in no order
    parts = list(zip(owners, flat.split(100), strict=True))
    sum_at_owners(parts, group)
    for index, owner in enumerate(owners):
        here = slice(100 * index, 100 * index + 100)
        kept = expected if owner == rank else before
        torch.testing.assert_close(flat[here], kept[here], rtol=1e-6, atol=1e-6)


def test_on_three_ranks(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path / "rendezvous"),), nprocs=SIZE)


def test_neighbours_of_one_owner_are_one_send() -> None:
    flat, other = torch.arange(10.0), torch.arange(10.0)
    parts = [(0, flat[2:4]), (0, flat[4:7]), (1, flat[7:9]), (0, flat[9:]), (0, other[:1])]
    runs = _runs(parts)
    assert [(owner, run.tolist()) for owner, run in runs] == [
        (0, [2, 3, 4, 5, 6]),
        (1, [7, 8]),
        (0, [9]),
        (0, [0]),
    ]
    assert all(
        run.data_ptr() == flat[start:].data_ptr() for (_, run), start in zip(runs, (2, 7, 9), strict=False)
    )


@pytest.mark.parametrize("owner", [0, 1])
def test_the_runs_of_another_tensor_do_not_join(owner: int) -> None:
    """Two tensors may lie end to end by accident: only one storage's parts are one send."""
    one, two = torch.zeros(4), torch.zeros(8)
    assert len(_runs([(owner, one), (owner, two[4:])])) == 2
