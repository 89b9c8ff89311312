"""Who races, besides TRL: our own step, and plain PyTorch loops around transformers.

Every racer starts from the same weights, sees the same documents in the same steps, runs the forward in bf16
under autocast over fp32 weights (a frozen base, in a LoRA run, is bf16 for all), clips to 1.0 and
updates with fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from burnish.data.count import count_windows
from burnish.host_memory import FreedMemory, bound_kernel_caches, keep_freed_memory
from burnish.plan import make_plan
from burnish.plan.schedule import learning_rate
from burnish.records import NO_TARGET, Example
from burnish.runtime import Ranks, pick_device
from step.cases import LORA, Race
from step.turns import Turns, forget_peak

ALONE = Ranks(0, 0, 1)
ROW_DOCUMENTS = 8
"""Documents of a padded forward: TRL's default batch."""


def own_engine(race: Race, device: torch.device, compiled: bool = False) -> tuple[Any, Any]:
    """Model, adapter, capability and engine, as `run.train` puts them together; and the feed."""
    from burnish.engine.build import build_engine, parameter_dtype
    from burnish.model.adapt import adapt
    from burnish.model.attention import can_isolate
    from burnish.model.compiled import compile_layers
    from burnish.model.forward import SupervisedModel
    from burnish.model.load import load_model
    from burnish.train.step import Feed

    config = race.config
    model = load_model(
        config.model,
        seed=0,
        init_context=None,
        param_dtype=parameter_dtype(config, ALONE),
    )
    model = adapt(model, config.adapter, "none")
    capability = can_isolate(model, config.model.attention, config.data.max_tokens)
    assert capability.packed and capability.fused_head, capability.reason
    compile_layers(model, capability, device, compiled)
    engine = build_engine(config, ALONE, device, SupervisedModel(model, capability))
    return engine, Feed(race.store, capability.packed, 0)


def burnish(race: Race, turns: Turns, compiled: bool = False) -> None:
    """`train_step` with everything around it that the loop does for a step."""
    from burnish.train.rehearsal import rehearse
    from burnish.train.step import train_step

    device = pick_device(ALONE)
    bound_kernel_caches(device)
    counts = count_windows(race.windows, race.store)
    memory = make_plan(race.config, counts, race.shape, 1, device_type=device.type).memory
    freed = FreedMemory(device)
    freed.settle(memory.device.kept > 0, memory.over_process)
    engine, feed = own_engine(race, device, compiled)
    told = race.config.model.model_copy(update={"compile": compiled})
    rehearse(engine, race.config.model_copy(update={"model": told}), feed, evaluates=False, ranks=ALONE)
    forget_peak()
    turns.ready({})
    config = race.config
    for step in range(1, race.windows.num_steps + 1):
        window = race.windows.window(step)
        lr = learning_rate(step, race.windows.num_steps, config.optim, config.schedule)
        stats, _ = train_step(engine, window, feed, ALONE, lr)
        freed.give_back()
        turns.step_done(stats.loss, {"phases": getattr(stats, "phase_seconds", None)})


def burnish_compiled(race: Race, turns: Turns) -> None:
    """The same with `model.compile`."""
    burnish(race, turns, compiled=True)


def load_plain(race: Race) -> torch.nn.Module:
    """The model as transformers gives it, or with an adapter as peft does."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if race.case.lora else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(race.model_folder, dtype=dtype)
    if not race.case.lora:
        return model
    from peft import get_peft_model

    torch.manual_seed(0)  # as `own_engine` seeds its adapter
    return get_peft_model(model, lora_config())


def lora_config() -> Any:
    """What our LoRA run trains, in peft's words."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=int(LORA["rank"]), lora_alpha=LORA["alpha"], target_modules="all-linear"
    )


Forward = Callable[[Any, Sequence[Example], torch.device], torch.Tensor]
"""Sum of the negative log-likelihoods of these documents' targets."""


def _plain_loop(
    race: Race,
    turns: Turns,
    forward: Forward,
    documents_at_once: int,
    as_is: bool = False,
    compiled: bool = False,
) -> None:
    device = pick_device(ALONE)
    if not as_is:
        keep_freed_memory(device)
    model = load_plain(race).to(device).train()
    if compiled:
        model.compile(dynamic=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    forget_peak()
    turns.ready({})
    for step in range(1, race.windows.num_steps + 1):
        documents = race.documents(step)
        num_targets = sum(int(e.trained.sum()) for e in documents)
        total = torch.zeros((), device=device)
        for begin in range(0, len(documents), documents_at_once):
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(model, documents[begin : begin + documents_at_once], device) / num_targets
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.step_done(total.item())


def labels_of(example: Example) -> np.ndarray:
    """Token ids where the token is trained on, NO_TARGET elsewhere: transformers' labels."""
    return np.where(example.weights > 0, example.token_ids, NO_TARGET).astype(np.int64)


def padded(documents: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Token ids, mask and labels, a row for each document."""
    longest = max(len(e.token_ids) for e in documents)
    ids = np.zeros((len(documents), longest), np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, NO_TARGET)
    for row, example in enumerate(documents):
        size = len(example.token_ids)
        ids[row, :size], mask[row, :size], labels[row, :size] = example.token_ids, 1, labels_of(example)
    return tuple(torch.from_numpy(x).to(device) for x in (ids, mask, labels))


def packed_row(documents: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Token ids, positions, a 4D mask that keeps documents apart, and labels, in one row."""
    lengths = [len(e.token_ids) for e in documents]
    ids = np.concatenate([e.token_ids for e in documents]).astype(np.int64)
    positions = np.concatenate([np.arange(n) for n in lengths])
    labels = np.concatenate([labels_of(e) for e in documents])
    labels[np.cumsum([0, *lengths[:-1]])] = NO_TARGET
    of = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
    mask = (of[:, None] == of[None, :]).tril_()[None, None]
    ids, positions, labels = (torch.from_numpy(x[None]).to(device) for x in (ids, positions, labels))
    return ids, positions, mask, labels


def _nll_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As transformers' own loss: logits to fp32, labels shifted."""
    shifted = functional.pad(labels, (0, 1), value=NO_TARGET)[:, 1:]
    flat = logits.float().view(-1, logits.shape[-1])
    return functional.cross_entropy(flat, shifted.reshape(-1), ignore_index=NO_TARGET, reduction="sum")


def hf_packed_nll(model: Any, documents: Sequence[Example], device: torch.device) -> torch.Tensor:
    """A `Forward`: the documents in one row under a 4D mask, all logits."""
    ids, positions, mask, labels = packed_row(documents, device)
    logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    return _nll_sum(logits, labels)


def _hf_padded(model: Any, documents: Sequence[Example], device: torch.device) -> torch.Tensor:
    ids, mask, labels = padded(documents, device)
    return _nll_sum(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels)


def _openrlhf(model: Any, documents: Sequence[Example], device: torch.device) -> torch.Tensor:
    """What OpenRLHF's Actor and SFT loss compute where flash_attn cannot be had, written anew.

    It pads (packing needs flash_attn there), takes all logits to fp32, and forms the log-probability of
    every token as its logit minus a logsumexp over 1,024 rows at a time.
    """
    ids, mask, labels = padded(documents, device)
    positions = (mask.cumsum(-1) - 1).masked_fill_(mask == 0, 1)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    logits = output.logits.float()
    at_next = logits.gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    rows = logits.view(-1, logits.shape[-1])
    normalizer = torch.cat([torch.logsumexp(part, -1) for part in rows.split(1024)]).view(at_next.shape)
    log_shares = (at_next - normalizer)[:, :-1]
    return -(log_shares * (labels[:, 1:] != NO_TARGET)).sum()


def hf_packed(race: Race, turns: Turns) -> None:
    """One row, 4D mask, all logits."""
    _plain_loop(race, turns, hf_packed_nll, race.case.examples_per_step)


def hf_packed_compiled(race: Race, turns: Turns) -> None:
    """The same with the model compiled, as `TrainingArguments(torch_compile=True)` does, for any length."""
    _plain_loop(race, turns, hf_packed_nll, race.case.examples_per_step, compiled=True)


def hf_packed_as_is(race: Race, turns: Turns) -> None:
    """The same without our allocator setting, as people run it."""
    _plain_loop(race, turns, hf_packed_nll, race.case.examples_per_step, as_is=True)


def hf_padded(race: Race, turns: Turns) -> None:
    """Padded rows of TRL's default batch, all logits."""
    _plain_loop(race, turns, _hf_padded, ROW_DOCUMENTS)


def openrlhf(race: Race, turns: Turns) -> None:
    """OpenRLHF's forward and loss, emulated."""
    _plain_loop(race, turns, _openrlhf, ROW_DOCUMENTS)


def matrix(_race: Race, turns: Turns) -> None:
    """No racer: the rate of bf16 matrix products, in the same turns; a step is 0.5 TFLOP or so."""
    device = pick_device(ALONE)
    factor = 4 if device.type == "cuda" else 1
    shapes = [(2048 * factor, 2048 * factor, 2048 * factor), (4096 * factor, 1024 * factor, 4096 * factor)]
    pairs = [
        (torch.randn(m, k, device=device).bfloat16(), torch.randn(k, n, device=device).bfloat16())
        for m, k, n in shapes
    ]
    flops = [2.0 * m * k * n for m, k, n in shapes]
    turns.ready({"flops": flops})
    which = 0
    while True:
        left, right = pairs[which % len(pairs)]
        for _ in range(10):
            _ = left @ right
        which += 1
        turns.step_done()
