"""DeepSpeed behind our protocol. The only module that imports deepspeed, which takes seconds.

The step recipe: our windows own the accumulation, and DeepSpeed is told when the step is.

    forward_backward   engine.backward(nll_sum / total_weight * world_size, scale_wrt_gas=False)
    step               engine.step()

`world_size` cancels DeepSpeed's averaging over ranks, so what is applied is the gradient of
`sum(weight * nll) / sum(weight)` over the whole window. Under ZeRO-2 and 3 every rank must run the
same number of micro-batches, which windows guarantee.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger
from jaxtyping import Float

from burnish.config.check import unsuited_optimizer
from burnish.config.raw_deepspeed import Names, setting_names, unknown_settings
from burnish.config.schema import Config
from burnish.engine.base import Engine, StepResult
from burnish.engine.ds_checkpoint import TAG, as_universal, nothing_found, refuse_other_stage, written_by
from burnish.engine.ds_config import (
    ModelSizes,
    deepspeed_config,
    nvme_folder,
    runs_in_fp32,
    swaps_optimizer,
    swaps_weights,
    uses_nvme,
)
from burnish.engine.ds_nvme import (
    has_swapped_state,
    read_swapped_state,
    remove_swap_files,
    swappers_of_weights,
    write_swapped_state,
)
from burnish.engine.ds_shards import gpus_of, shards_of_zero, share_of, sizes_of
from burnish.engine.ds_weights import round_weights, set_masters, share_whole_weights
from burnish.engine.ds_workarounds import (
    add_without_copy,
    announce_ranks,
    ask_once,
    forget_sums,
    gather_by_sends,
    groups_kept_apart,
    join_alone,
    keep_gradients_in_memory,
    measure_by_rows,
    quieten,
    skip_shm_compile,
    sum_by_sends,
    swap_files_left_alone,
    without_prints,
)
from burnish.engine.gradients import clip_gradients, drop_gradients, finite_on_all_ranks, global_grad_norm
from burnish.engine.muon import MuonAdamW
from burnish.engine.optimizer import build_optimizer, set_learning_rate
from burnish.engine.phases import PhaseClock
from burnish.engine.precision import LossScale, autocast, compiles_products
from burnish.engine.state_files import exported_weights
from burnish.errors import CheckpointError, ConfigError, MachineError, Problem, counted
from burnish.model.device_batch import to_device
from burnish.model.foresee import largest_parameter
from burnish.model.forward import SupervisedModel
from burnish.model.load import COMPUTE_DTYPES
from burnish.model.tiling import tiled_modules
from burnish.records import MicroBatch
from burnish.runtime import Ranks, barrier, log

_LOCK_CURE = "delete the file `lock` below ~/.cache/torch_extensions (or TORCH_EXTENSIONS_DIR)."
_LOSS_SCALE = "burnish_loss_scale"
"""Under which DeepSpeed keeps what it does not know of."""


def prepare_deepspeed(ranks: Ranks, device: torch.device) -> None:
    """What has to be said to DeepSpeed before it is used; calling it again does nothing new."""
    quieten(deepspeed_logger)
    if device.type == "cpu":
        skip_shm_compile(deepspeed.ops.__compatible_ops__)
    announce_ranks(ranks, device)
    join_alone(ranks, device)
    deepspeed.init_distributed(verbose=False)
    if device.type == "cpu":
        gather_by_sends(deepspeed.comm.comm.cdb)


def _check_settings(config: Config) -> None:
    """What only the DeepSpeed that is installed can tell about a config."""
    section = config.engine.deepspeed.get("zero_optimization", {})
    where = "engine.deepspeed.zero_optimization"
    unknown = list(unknown_settings(section, known_zero_settings(), where))
    if unknown:
        raise ConfigError(*unknown)
    accelerator: Any = get_accelerator()
    if config.model.dtype == "fp16" and not accelerator.is_fp16_supported():
        cure = "Use bf16 or fp32 here, or engine.kind: local."
        raise MachineError(Problem("model.dtype", "DeepSpeed does not run fp16 on this device", cure))
    if uses_nvme(config) and not AsyncIOBuilder().is_compatible(verbose=False):
        what = "nvme needs Linux, a C++ compiler and the headers of libaio"
        cure = "Install them (on Debian: apt install g++ libaio-dev), or offload to cpu."
        key = "engine.offload_optimizer" if swaps_optimizer(config) else "engine.offload_params"
        raise MachineError(Problem(key, what, cure))
    if uses_nvme(config):
        # torch's builder waits for ever, and says nothing, where a run was killed while it compiled.
        log.info("DeepSpeed compiles async_io once, which takes minutes. Should it never end: %s", _LOCK_CURE)


def known_zero_settings() -> Names:
    """The settings that DeepSpeed has under `zero_optimization`, from the class that it checks them by."""
    return setting_names(DeepSpeedZeroConfig)


@contextlib.contextmanager
def zero3_init_context(
    config: Config, ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """While entered, `from_pretrained` partitions weights over the ranks as it loads them, in `dtype`.

    transformers looks for a live config object that it only refers to weakly; it lives as long as
    the context does.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    prepare_deepspeed(ranks, device)
    _check_settings(config)
    largest = largest_parameter(config.model) if swaps_weights(config) else None
    sizes = None if largest is None else ModelSizes(largest_share=share_of(ranks, largest))
    settings = deepspeed_config(config, gpus_of(ranks, device), sizes)
    if dtype == torch.float32:  # zero.Init takes the dtype from these sections
        settings = {key: value for key, value in settings.items() if key not in ("bf16", "fp16")}
    kept_alive = HfDeepSpeedConfig({**settings, "train_batch_size": ranks.world_size})
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept_alive


@final
class DeepSpeedEngine(Engine):
    """ZeRO 0 to 3 over any number of ranks, one included.

    Args:
        model: Model and loss; its weights in the dtype of the forward, or in fp32.
        config: Optimizer, ZeRO stage, offload and precision are taken from it.
        ranks: This process among the others, all data-parallel.
        device: Where to compute.

    Raises:
        MachineError: fp16 on a device for which DeepSpeed does not run it, most CPUs among them.
        ConfigError: The optimizer cannot work on what ZeRO gives it.
    """

    def __init__(self, model: SupervisedModel, config: Config, *, ranks: Ranks, device: torch.device) -> None:
        prepare_deepspeed(ranks, device)
        _check_settings(config)
        self._ranks = ranks
        self._device = device
        compute_dtype = torch.float32 if runs_in_fp32(config) else COMPUTE_DTYPES[config.model.dtype]
        self._fill_up = compiles_products(device, compute_dtype)
        self._clock = PhaseClock(device)
        self._run_dir = Path(config.output_dir)
        self._stage = config.engine.zero_stage
        # At other stages than 0 weights are in the forward's dtype, and nothing is cast.
        self._autocasts_to = COMPUTE_DTYPES[config.model.dtype] if self._stage == 0 else torch.float32
        self._adapter_only = config.adapter is not None
        self._optimizer_name = config.optim.name
        share_whole_weights(model, ranks, device)
        if self._stage == 3:
            # The loss uses the head's matrix directly, so ZeRO-3 must gather it with this module.
            for parameter in model.external_parameters():
                deepspeed.zero.register_external_parameter(model, parameter)
            for module in tiled_modules(model):  # gathered once, however many tiles a rank has
                deepspeed.utils.set_z3_leaf_module(module, True)
        model.train()
        problem = unsuited_optimizer(config)
        if problem is not None:
            raise ConfigError(problem)
        self._optimizer = build_optimizer(model, config.optim)
        groups = [list(group["params"]) for group in self._optimizer.param_groups]
        precise = {} if compute_dtype == torch.float32 else round_weights(model, compute_dtype)
        with without_prints():
            self._engine: Any = deepspeed.initialize(
                model=model,
                optimizer=self._optimizer,
                config=deepspeed_config(config, gpus_of(ranks, device), sizes_of(model, ranks)),
                dist_init_required=False,
            )[0]
        if precise:
            set_masters(self._engine.optimizer, self._stage, precise, ranks.rank)
            precise = {}  # gives its memory back
        if isinstance(self._optimizer, MuonAdamW) and self._stage > 0:
            self._optimizer.locate(shards_of_zero(self._engine.optimizer, groups, self._stage, ranks))
        self._uses_nvme = uses_nvme(config)
        if self._uses_nvme:
            self._prepare_swapping(config)
        # Stage 0 is the one case where DeepSpeed applies whatever it is given, NaN included, and
        # measures nothing: there we reduce, look, and clip before we let it step.
        self._max_grad_norm = config.optim.max_grad_norm
        self._scale = LossScale(config.model.dtype == "fp16")
        if self._stage > 0:
            self._spare_copies()
        else:
            self._engine.enable_backward_allreduce = False
            self._engine.torch_autocast_z0_gradscaler = None  # ours is in `forward_backward`

    def _spare_copies(self) -> None:
        zero = self._engine.optimizer
        if not isinstance(zero, BF16_Optimizer):  # stage 1 in bf16, which makes no such copies
            measure_by_rows(zero)
        if isinstance(zero, DeepSpeedZeroOptimizer):
            add_without_copy(zero)
            if self._device.type == "cpu":
                sum_by_sends(zero)

    def _prepare_swapping(self, config: Config) -> None:
        """What DeepSpeed needs to swap to NVMe as it should, and to leave nothing there."""
        if swaps_optimizer(config):
            keep_gradients_in_memory(self._engine.optimizer.optimizer_swapper)
        if swaps_weights(config):
            for swapper in swappers_of_weights(self._engine.module):
                ask_once(swapper)
        weakref.finalize(self, remove_swap_files, nvme_folder(config), self._ranks.rank)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._device

    def forward_backward(self, micro_batch: MicroBatch, total_weight: float) -> Float[torch.Tensor, ""]:
        """See `Engine.forward_backward`."""
        with self._clock.phase("forward"):
            nll_sum = self._engine(to_device(micro_batch, self._device, self._fill_up))
        with self._clock.phase("backward"):
            loss = nll_sum / total_weight * self._ranks.world_size
            if self._stage == 0:
                loss = loss * self._scale.value
            elif self._engine.fp16_enabled():  # it multiplies by its own, and divides by it in the step
                self._engine.optimizer.loss_scaler.cur_scale = self._scale.value
            self._engine.backward(loss, scale_wrt_gas=False)
        return nll_sum.detach()

    def rehearse(self, micro_batch: MicroBatch) -> None:
        """See `Engine.rehearse`. Past DeepSpeed, which would take note of a backward; not at stage 3."""
        with autocast(self._device, self._autocasts_to):
            nll_sum = self._engine.module(to_device(micro_batch, self._device, self._fill_up))
        drop_gradients(nll_sum, self._engine.module)

    def step(self, lr: float) -> StepResult:
        """See `Engine.step`."""
        set_learning_rate(self._optimizer, lr)
        result = self._step_of_deepspeed() if self._stage > 0 else self._step_after_looking()
        seconds = self._clock.take()
        return replace(
            result, forward_seconds=seconds.get("forward"), backward_seconds=seconds.get("backward")
        )

    def _step_of_deepspeed(self) -> StepResult:
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        # After gradients that are not finite, DeepSpeed still has the norm of the step before.
        norm = self._engine.get_global_grad_norm() if applied else None
        if not applied and self._stage < 3:
            forget_sums(self._engine.optimizer)
        return StepResult(
            None if norm is None else float(norm), applied, may_repeat=self._scale.update(applied)
        )

    def _step_after_looking(self) -> StepResult:
        self._engine.buffered_allreduce_fallback()
        parameters = [p for p in self._engine.module.parameters() if p.requires_grad]
        self._scale.unscale(parameters)
        norm = global_grad_norm(parameters)
        applied = finite_on_all_ranks(norm, self._ranks)
        if applied:
            clip_gradients(parameters, norm, self._max_grad_norm)
            self._engine.step()
        else:
            self._engine.zero_grad()
        return StepResult(norm.item(), applied, may_repeat=self._scale.update(applied))

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch) -> Float[torch.Tensor, " documents"]:
        """See `Engine.evaluate`."""
        self._engine.eval()
        try:
            batch = to_device(micro_batch, self._device, self._fill_up)
            return self._engine(batch, per_document=True).float()
        finally:
            self._engine.train()

    def save_state(self, folder: Path) -> Sequence[Path]:
        """Let DeepSpeed write its shards; without its `latest` file, which it writes too early."""
        with swap_files_left_alone(self._engine):
            self._engine.save_checkpoint(
                str(folder),
                tag=TAG,
                client_state={
                    # Lets ds_to_universal convert the shards for another world size.
                    "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
                    _LOSS_SCALE: self._scale.state_dict(),
                },
                save_latest=False,
                exclude_frozen_parameters=self._adapter_only,
            )
        if self._uses_nvme:
            write_swapped_state(self._engine.optimizer, folder / TAG, self._ranks.rank)
            barrier(self._ranks)  # until then other ranks' half-written files lie in the folder too
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [path for path in files if written_by(self._ranks, path)]

    def load_state(self, folder: Path) -> None:
        """Load the shards; those of another number of ranks are converted first.

        Raises:
            CheckpointError: They were written under a ZeRO stage that this one cannot take over
                from (1 and 2 can from each other), the conversion failed, or the optimizer's state
                cannot be converted.
        """
        num_shards = len(list((folder / TAG).glob("*_optim_states.pt")))
        refuse_other_stage(folder, self._stage, num_shards)
        if self._uses_nvme or has_swapped_state(folder / TAG):
            self._load_swapped(folder, num_shards)
            return
        if self._stage == 0 or num_shards == self._ranks.world_size:
            self._load(folder)
            return
        if not isinstance(self._optimizer, torch.optim.AdamW):
            # Universal checkpoints know Adam's two moments and nothing else.
            what = f"{self._optimizer_name}'s state was saved by {counted(num_shards, 'rank')}"
            cure = f"Resume on {num_shards}: only adamw's state can be laid out for another number."
            raise CheckpointError(Problem("checkpoint.resume", what, cure))
        log.info("Converting %s from %s to %d.", folder, counted(num_shards, "rank"), self._ranks.world_size)
        with as_universal(self._engine, folder, self._run_dir, self._ranks) as converted:
            self._load(converted)

    def _load(self, folder: Path) -> None:
        with groups_kept_apart(self._optimizer):
            path, client_state = self._engine.load_checkpoint(
                str(folder),
                tag=TAG,
                load_module_strict=not self._adapter_only,
                load_lr_scheduler_states=False,
            )
        if path is None:
            raise nothing_found(folder)
        self._scale.load_state_dict(client_state.get(_LOSS_SCALE, {}))

    def _load_swapped(self, folder: Path, num_shards: int) -> None:
        """Load state that was on NVMe, wherever it is to be now."""
        where = "checkpoint.resume"
        if not has_swapped_state(folder / TAG):
            cure = "Resume with the offload settings that it was saved with."
            raise CheckpointError(Problem(where, "the checkpoint was saved without offload to nvme", cure))
        if num_shards != self._ranks.world_size:
            what = f"the checkpoint was saved by {counted(num_shards, 'rank')}, with state on nvme"
            raise CheckpointError(Problem(where, what, f"Resume on {counted(num_shards, 'rank')}."))
        zero = self._engine.optimizer
        zero.checkpoint_event_prologue()
        # Everything but ZeRO's own state: frozen weights, buffers, counters.
        path, client_state = self._engine._load_checkpoint(
            str(folder),
            TAG,
            load_module_strict=not self._adapter_only,
            load_lr_scheduler_states=False,
        )
        if path is None:
            raise nothing_found(folder)
        read_swapped_state(zero, folder / TAG, self._ranks.rank)
        zero.checkpoint_event_epilogue()
        self._scale.load_state_dict(client_state.get(_LOSS_SCALE, {}))

    def export_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.export_state`. Every rank takes part in the gathering."""
        model, is_main = self._engine.module.model, self._ranks.is_main
        if self._stage < 3:
            return exported_weights(model, self._adapter_only) if is_main else None
        zero = self._engine.optimizer
        zero.checkpoint_event_prologue()
        # Nothing is modified; DeepSpeed's own export says so all the same, to free what was gathered.
        gather = partial(deepspeed.zero.GatheredParameters, modifier_rank=0)
        exported = exported_weights(model, self._adapter_only, gather, keep=is_main)
        zero.checkpoint_event_epilogue()
        return exported
