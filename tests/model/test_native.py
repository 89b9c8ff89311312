"""The kernels for CPUs that multiply bf16: against the same in fp32, with AMX and without it."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from burnish.model.cpu_kernel import document_flash_attention
from burnish.model.native import attend as attend_module
from burnish.model.native import build
from burnish.model.native import softmax as softmax_module
from burnish.model.native.attend import Paths, attend, can_attend
from burnish.model.native.softmax import softmax
from burnish.model.prefix_attention import (
    Segments,
    paths_of,
    prefix_mask,
    prefix_numbers,
    shared_flash_attention,
)

needs_kernels = pytest.mark.skipif(build.why_not() is not None, reason=f"no kernels: {build.why_not()}")
ROUNDED = 6e-3
"""Of a result's norm: bf16 has 8 bits, and what goes into a product was rounded once or twice."""


@pytest.fixture(params=[True, False], ids=["amx", "avx512"])
def kernels(request, monkeypatch):
    """Each of the two ways to multiply, where the processor has it."""
    if build.why_not() is not None:
        pytest.skip(f"no kernels: {build.why_not()}")
    if request.param and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    library = build._load(request.param)
    assert library is not None
    for module in (attend_module, softmax_module):
        monkeypatch.setattr(module, "kernels", lambda: library)
    return library


def states(heads, key_heads, tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, tokens, n, width, generator=generator) for n in (heads, key_heads, key_heads)]
    # Heads behind tokens in memory, as a model's projections give them.
    return [x.bfloat16().transpose(1, 2).requires_grad_() for x in made]


def apart(found, expected):
    """As a share of the expected norm; where that is 0 (a token that sees itself alone), of 1e-3 a number."""
    wide = expected.float()
    return ((found.float() - wide).norm() / (wide.norm() + 1e-3 * wide.numel() ** 0.5)).item()


def require_near(inputs, out, exact_inputs, exact):
    seed = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert out.dtype == torch.bfloat16 and apart(out, exact) < ROUNDED
    grads = torch.autograd.grad(out, inputs, seed)
    for found, expected in zip(grads, torch.autograd.grad(exact, exact_inputs, seed.float()), strict=True):
        assert found.dtype == torch.bfloat16 and apart(found, expected) < ROUNDED


LENGTHS = [(1,), (31, 32, 33), (5, 1, 12, 7), (200, 3, 129), (128, 128), (300,)]
HEADS = [(4, 4, 64), (4, 2, 16), (6, 1, 80), (2, 2, 128), (1, 1, 256)]


@pytest.mark.parametrize("window", [None, 1, 37, 64])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "key_heads", "width"), HEADS)
def test_documents(kernels, lengths, heads, key_heads, width, window):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = states(heads, key_heads, sum(lengths), width)
    exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
    out = attend(*inputs, Paths.of_documents(bounds, inputs[0].shape[2]), 0.2, window)
    exact = document_flash_attention(*exact_inputs, bounds.tolist(), 0.2, window)
    require_near(inputs, out, exact_inputs, exact)


def test_shared_beginnings(kernels):
    # A beginning of 40 tokens; below it one of 3 with two documents, and two documents more.
    begins, stops, ends = (0, 40, 43, 50, 90, 91), (40, 43, 50, 90, 91, 200), (200, 90, 50, 90, 91, 200)
    segments = torch.tensor([begins, stops, ends], dtype=torch.int32).numpy()
    mask = prefix_mask(torch.from_numpy(prefix_numbers(segments)), len(begins), 110)
    inputs = states(4, 2, 200, 64)
    exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
    out = attend(*inputs, paths_of(mask), 0.2, None)
    require_near(
        inputs, out, exact_inputs, shared_flash_attention(*exact_inputs, Segments(begins, stops, ends), 0.2)
    )


def test_the_same_again_and_whatever_the_number_of_threads(kernels):
    bounds = torch.tensor([0, 70, 71, 300], dtype=torch.int32)
    results = []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 2):
            torch.set_num_threads(num_threads)
            inputs = states(4, 2, 300, 32)
            out = attend(*inputs, Paths.of_documents(bounds, inputs[0].shape[2]), 0.2, None)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("window", [None, 37])
def test_the_operation_is_what_torch_expects(kernels, window):
    """Its schema, what it says of shapes and layouts, its gradient, and both under a compiler's tracing."""
    inputs = states(4, 2, 90, 32)
    paths = Paths.of_documents(torch.tensor([0, 40, 41, 90]).int(), 90)
    numbers = paths.key_bounds, paths.columns, paths.query_lengths, False, 0.2, window
    torch.library.opcheck(attend_module._attention, (*inputs, *numbers))


def test_what_is_not_finite_is_not_hidden_and_stays_in_its_document(kernels):
    inputs = query, key, value = states(2, 2, 80, 32)
    with torch.no_grad():
        value[0, 0, 45, 3] = float("nan")
        key[0, 1, 60, 0] = float("inf")
    segments = Paths.of_documents(torch.tensor([0, 40, 70, 80]).int(), 80)
    out = attend(query, key, value, segments, 0.2, None)
    bad = ~out.isfinite()
    assert bad[0, 45:70, 0, 3].all() and bad[0, 60:70, 1].any()
    assert not bad[0, :40].any() and not bad[0, 70:].any()
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert not gradients[0][0, 0, 40:70].isfinite().all()
    for gradient in gradients:
        assert gradient[0, :, :40].isfinite().all() and gradient[0, :, 70:].isfinite().all()


def laid_out(logits, by_tokens):
    """In one of the two layouts: tokens first in memory, or vocabulary first."""
    return logits.contiguous() if by_tokens else logits.T.contiguous().T


@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize("tokens", [9, 16, 70])
@pytest.mark.parametrize("size", [16, 53, 777, 32000])
def test_softmax(kernels, size, tokens, by_tokens):
    generator = torch.Generator().manual_seed(0)
    logits = laid_out((8 * torch.randn(tokens, size, generator=generator)).bfloat16(), by_tokens)
    logits[1] = -200.0
    logits[2, 3] = 300.0  # a share of 1: its gradient is the rest, not 0 in the sum of others
    targets = torch.randint(size, (tokens,), generator=generator)
    targets[2], nll = 3, torch.empty(tokens)
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, targets, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    softmax(logits.clone(), targets, nll, gradient=False)
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-6, atol=4e-6)
    softmax(logits, targets, nll, gradient=True)
    at_targets = torch.arange(tokens), targets
    torch.testing.assert_close(logits[at_targets].double(), slope[at_targets], rtol=8e-3, atol=4e-6)
    logits[at_targets], slope[at_targets] = 0, 0
    torch.testing.assert_close(logits.double(), slope, rtol=8e-3, atol=1e-30)


@pytest.mark.parametrize("by_tokens", [True, False])
def test_softmax_of_what_is_not_finite(kernels, by_tokens):
    logits = laid_out(torch.zeros(3, 40).bfloat16(), by_tokens)
    logits[:, 7] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    nll = torch.empty(3)
    softmax(logits, torch.tensor([7, 7, 0]), nll, gradient=True)
    assert nll[0].isnan() and nll[1].isnan() and nll[2].item() == pytest.approx(torch.tensor(39.0).log())
    assert logits[0].isnan().all() and logits[2].isfinite().all()


@pytest.mark.parametrize("by_tokens", [True, False])
def test_softmax_over_words_that_cannot_be_produced(kernels, by_tokens):
    logits = laid_out(torch.full((20, 400), float("-inf")).bfloat16(), by_tokens)
    logits[:, 130:140] = 1.0
    nll = torch.empty(20)
    softmax(logits, torch.full((20,), 130), nll, gradient=True)
    torch.testing.assert_close(nll, torch.full((20,), 10.0).log())
    torch.testing.assert_close(logits[:, 131:140].float(), torch.full((20, 9), 0.1), rtol=8e-3, atol=0)
    assert logits[:, :130].abs().max() < 1e-30 and logits[:, 140:].abs().max() < 1e-30


@pytest.mark.parametrize("by_tokens", [True, False])
def test_softmax_is_the_same_whatever_the_number_of_threads(kernels, by_tokens):
    logits = (8 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))).bfloat16()
    targets, results, threads = torch.arange(50), [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            gradient, nll = laid_out(logits, by_tokens).clone(), torch.empty(50)
            softmax(gradient, targets, nll, gradient=True)
            results.append((gradient, nll))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@needs_kernels
def test_who_is_taken():
    wide, narrow = torch.zeros(1, 2, 4, 32), torch.zeros(1, 2, 4, 24)
    assert not can_attend(wide, wide, 100)  # fp32 stays exact
    assert can_attend(wide.bfloat16(), wide.bfloat16(), 100)
    assert not can_attend(wide.bfloat16(), wide.bfloat16(), 100_000)
    assert not can_attend(narrow.bfloat16(), narrow.bfloat16(), 100)
    assert not can_attend(wide.bfloat16(), narrow.bfloat16(), 100)
    with torch.autocast("cpu", torch.bfloat16):
        assert can_attend(wide, wide, 100)
    with torch.autocast("cpu", torch.float16):
        assert not can_attend(wide, wide, 100)


@pytest.fixture
def not_loaded_yet():
    build.kernels.cache_clear()
    yield
    build.kernels.cache_clear()


@needs_kernels
def test_compiled_once_and_no_part_of_it_is_left(tmp_path):
    library = build._compiled(tmp_path, amx=False)
    written = library.stat().st_mtime_ns
    assert build._compiled(tmp_path, amx=False) == library and library.stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [library]


@needs_kernels
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog, not_loaded_yet):
    (tmp_path / "burnish").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.kernels() is not None and not caplog.text


@needs_kernels
def test_where_they_cannot_be_compiled_training_goes_on_without(
    tmp_path, monkeypatch, caplog, not_loaded_yet
):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho it is too old >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.kernels() is None
    assert "slower without them" in caplog.text and "too old" in caplog.text
    assert not list(tmp_path.glob("burnish/kernels/*"))


@needs_kernels
def test_one_openmp_library_in_the_process():
    """With two, each keeps threads of its own that wait for work at full speed."""
    build.kernels()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in mapped if "omp.so" in line or "omp5.so" in line}
    assert len({Path(path).resolve() for path in paths}) == 1, paths


@needs_kernels
def test_no_warning_from_the_compiler():
    compiler, program = build._compiler(), ["-c", "-o", os.devnull, "-Wall", "-Wextra", "-Werror"]
    for flags in ((), build._AMX_FLAGS):
        for source in build._SOURCES.glob("*.c"):
            command = [compiler, *build._FLAGS, *flags, *program, str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
