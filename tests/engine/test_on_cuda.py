"""What a GPU adds to the local engine: the same steps as on a CPU, fp16's loss scale, memory given back."""

from __future__ import annotations

import pytest
import torch

from burnish.data.collate import collate
from burnish.engine.build import parameter_dtype
from burnish.engine.ds_config import FIRST_LOSS_SCALE_POWER
from burnish.engine.local import LocalEngine
from burnish.runtime import Ranks
from rig.toy import toy_config, toy_model, toy_store

ALONE = Ranks(0, 0, 1)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses_and_norms(device: str, dtype: torch.dtype, num_steps: int = 6) -> list[tuple[float, float]]:
    config = toy_config("out", {})
    engine = LocalEngine(
        toy_model(config, parameter_dtype(config, ALONE)),
        config.optim,
        ranks=ALONE,
        device=torch.device(device),
        compute_dtype=dtype,
        adapter_only=False,
    )
    store, found = toy_store(), []
    for step in range(num_steps):
        ids = [3 * step % 27, (3 * step + 1) % 27, (3 * step + 2) % 27]
        weight = float(store.total_weight[ids].sum())
        loss = engine.forward_backward(collate([store[i] for i in ids], ids, True, 0), weight)
        result = engine.step(0.003)
        assert result.applied
        found.append((loss.item() / weight, result.grad_norm))
    return found


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)]
)
def test_a_gpu_takes_the_same_steps_as_a_cpu(dtype: torch.dtype, bound: float) -> None:
    torch.testing.assert_close(
        losses_and_norms("cuda", dtype), losses_and_norms("cpu", torch.float32), rtol=bound, atol=bound
    )


def test_fp16_lowers_its_scale_after_an_overflow_and_applies_nothing() -> None:
    config = toy_config("out", {})
    engine = LocalEngine(
        toy_model(config, torch.float32),
        config.optim,
        ranks=ALONE,
        device=torch.device("cuda"),
        compute_dtype=torch.float16,
        adapter_only=False,
    )
    before = {name: tensor.clone() for name, tensor in (engine.export_state() or {}).items()}
    batch = collate([toy_store()[0]], [0], True, 0)
    engine.forward_backward(batch, 1e-12)  # so small a denominator is more than fp16 can hold
    result = engine.step(0.003)
    assert not result.applied and result.may_repeat
    assert engine._scale.value < 2**FIRST_LOSS_SCALE_POWER
    assert all(torch.equal(tensor, before[name]) for name, tensor in (engine.export_state() or {}).items())
