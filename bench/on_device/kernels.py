"""Attention, head and host syncs on a device: right first, then how fast."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from burnish.model.document_attention import document_attention, document_mask
from burnish.model.head import HeadShape, supervised_loss
from on_device.rows import Rows

BF16_BOUND = 2e-2
"""Relative to the largest entry: what bf16 inputs allow."""


def machine(device: str, quick: bool) -> dict[str, Any]:
    """Card, versions, and the rate of plain bf16 matrix products, which everything is held against."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rate = matrix_rate(device, 1024 if quick else 8192)
    return {"ok": True, "card": name, "memory_bytes": memory, **versions, "matrix_flops_per_second": rate}


def matrix_rate(device: str, size: int) -> float:
    """FLOP/s of `[size, size] @ [size, size]` in bf16, median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device, rounds=10)


def median_seconds(work: Callable[[], Any], device: str, rounds: int = 7) -> float:
    """Median time of `work`, the device waited for before and after each."""
    for _ in range(2):
        work()
    seconds = []
    for _ in range(rounds):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def wait(device: str) -> None:
    """Until the device has done everything it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def documents(total: int, longest: int, seed: int) -> list[int]:
    """Lengths like an instruction set's (log-normal, median 200), cut at `longest`, that fill `total`."""
    chance = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        length = int(np.clip(chance.lognormal(math.log(200), 0.9), 8, longest))
        lengths.append(min(length, total - sum(lengths)))
    return lengths


def attention(device: str, quick: bool, rows: Rows) -> dict[str, Any]:
    """Our function on packed documents against fp32 on each alone; its time against SDPA's with a mask."""
    tokens = 512 if quick else 16384
    shapes = {
        "grouped 32/8 x 128": (32, 8, 128),
        "plain 14/2 x 64": (14, 2, 64),
        "wide 8/4 x 256": (8, 4, 256),
    }
    ok = True
    for name, (heads, key_heads, width) in shapes.items():
        for window in (None, 128):
            lengths = documents(tokens, 4096, seed=len(rows.all))
            row = _one_attention((heads, key_heads, width), lengths, window, device)
            rows.add({"shape": name, "window": window, **row})
            ok = ok and row["worst_error"] < BF16_BOUND
    return {"ok": ok, "tokens": tokens, "rows": rows.all}


def _one_attention(
    shape: tuple[int, int, int], lengths: list[int], window: int | None, device: str
) -> dict[str, Any]:
    heads, key_heads, width = shape
    tokens = sum(lengths)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, n, tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, key_heads, key_heads)
    )
    seed = torch.randn(1, tokens, heads, width, device=device, dtype=torch.bfloat16)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    mask = document_mask(bounds, max(lengths))

    def ours() -> tuple[torch.Tensor, ...]:
        out, _ = document_attention(torch.nn.Identity(), q, k, v, mask, sliding_window=window)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), seed))

    dense = _dense_mask(lengths, window, device)

    def masked() -> tuple[torch.Tensor, ...]:
        # Heads repeated, as transformers does it: not every kernel takes fewer key heads beside a mask.
        keys, values = (x.repeat_interleave(heads // key_heads, 1) for x in (k, v))
        out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=dense).transpose(1, 2)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), seed))

    errors = [_error(a, b) for a, b in zip(ours(), _each_alone(q, k, v, seed, lengths, window), strict=True)]
    seconds = median_seconds(ours, device)
    try:
        ratio: float | str = round(median_seconds(masked, device) / seconds, 2)
    except torch.OutOfMemoryError:
        ratio = "SDPA runs out of memory"
    return {"worst_error": max(errors), "ms": round(seconds * 1e3, 2), "times_faster_than_masked_sdpa": ratio}


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference relative to the largest exact entry."""
    return float((found.float() - exact.float()).abs().max() / exact.float().abs().max())


def _dense_mask(lengths: list[int], window: int | None, device: str) -> torch.Tensor:
    places = torch.arange(sum(lengths), device=device)
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    seen = (of[:, None] == of[None, :]) & (places[:, None] >= places[None, :])
    return seen if window is None else seen & (places[:, None] - places[None, :] < window)


def _each_alone(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor,
    lengths: list[int],
    window: int | None,
) -> list[torch.Tensor]:
    """Output and gradients of every document by itself, in fp32, by the formula."""
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    groups, begin, outs = q.shape[1] // k.shape[1], 0, []
    for length in lengths:
        a, b, c = (x[:, :, begin : begin + length] for x in exact)
        b, c = b.repeat_interleave(groups, 1), c.repeat_interleave(groups, 1)
        scores = (a @ b.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~_dense_mask([length], window, q.device.type), -math.inf)
        outs.append((scores.softmax(-1) @ c).transpose(1, 2))
        begin += length
    out = torch.cat(outs, 1)
    return [out.detach(), *torch.autograd.grad(out, exact, seed.float())]


def head(device: str, quick: bool, rows: Rows) -> dict[str, Any]:
    """Our loss on supervised positions against cross-entropy on full logits: numbers, time, memory."""
    ok = True
    shapes = ((64, 300, 0.9),) if quick else ((896, 151936, 0.9), (896, 151936, 0.3), (4096, 128256, 0.9))
    for width, vocabulary, supervised in shapes:
        row = _one_head(width, vocabulary, supervised, 256 if quick else 8192, device)
        rows.add({"width": width, "vocabulary": vocabulary, "f": supervised, **row})
        ok = ok and row["gradient_error"] < BF16_BOUND and row["loss_error"] < 1e-3
    return {"ok": ok, "rows": rows.all}


def _one_head(width: int, vocabulary: int, supervised: float, tokens: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    kept = torch.arange(int(tokens * supervised), device=device)
    ones = torch.ones(len(kept), device=device)

    def ours() -> tuple[torch.Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            loss = supervised_loss(hidden[kept], weight, None, targets[kept], ones, HeadShape())
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    labels = torch.full_like(targets, -100)
    labels[kept] = targets[kept]

    def full() -> tuple[torch.Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            logits = hidden @ weight.T
        loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    (a, *mine), (b, *plain) = ours(), full()
    error = max(_error(x, y) for x, y in zip(mine, plain, strict=True))
    loss_error = float((a - b).abs() / b.abs())
    times = median_seconds(full, device), median_seconds(ours, device)
    row = {"loss_error": loss_error, "gradient_error": error, "times_faster": round(times[0] / times[1], 2)}
    if device == "cuda":
        row["memory_share"] = round(_peak(ours) / _peak(full), 3)
    return row


def _peak(work: Callable[[], Any]) -> int:
    """Bytes allocated at most by `work`, over what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def syncs(device: str) -> dict[str, Any]:
    """Where a step makes the host wait for the device, by PyTorch's own warnings; one wait is expected: the
    step's loss and gradient norm are read once, at its end."""
    from on_device.small_job import small_step

    step = small_step(torch.device(device))
    step()
    if device != "cuda":
        return {"ok": True, "note": "only CUDA tells"}
    found: dict[str, int] = {}

    def note(message: Any, category: Any, filename: str, line: int, *_: Any) -> None:  # noqa: ARG001
        if "synchronizing" in str(message):  # others warn too, of what is deprecated
            found[f"{filename}:{line}"] = found.get(f"{filename}:{line}", 0) + 1

    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    inside = [place for place in found if "engine/" not in place and "train/step" not in place]
    return {"ok": not inside, "places": _shortened(found)}


def _shortened(found: Mapping[str, int]) -> dict[str, int]:
    """Without the folders that a package happens to lie in."""
    roots = sorted(sys.path, key=len, reverse=True)
    shortened = {}
    for place, count in found.items():
        root = next((r for r in roots if r and place.startswith(r)), "")
        shortened[place[len(root) :].lstrip("/")] = count
    return shortened
