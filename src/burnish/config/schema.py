"""Every key of a config: typed, frozen, with the sentence that `--help-all` and the docs print.

No torch here. `None` means off. Contradictions between keys are found in `config/check.py`,
unknown keys and wrong types in `config/load.py`; this file only says what there is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Auto = Literal["auto"]
# Sizes and counts stay far inside what arrays hold: a slip of the keyboard is an error of its key.
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Part = Annotated[float, Field(ge=0.0, lt=1.0)]  # where all of it would leave nothing, or divide by it
MAX_EPOCHS = 100_000
"""Passes over the data that are planned, one by one, before anything runs."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The base model: any Hugging Face causal language model."""

    path: str
    """Hub name or folder of the base model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Hub name or folder of the tokenizer; null takes the model's own."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained loads the weights; random builds the architecture from config.json afresh."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """What the forward runs in; masters and optimizer state are fp32."""
    attention: Literal[
        "auto", "varlen", "flash_attention_2", "flash_attention_3", "flex", "sdpa", "eager"
    ] = "auto"
    """Attention kernel; auto picks the fastest that keeps packed documents apart."""
    activation_checkpointing: Literal["none", "light", "full", "offload", "auto"] = "none"
    """What the backward computes again to save memory: light all but products, full whole layers, offload
    full with their inputs in the host's memory; auto follows the memory plan."""
    compile: bool | Auto = "auto"
    """Compile each layer (torch.compile): faster steps after a minute or so at the start. auto does it for
    long runs on CPUs."""
    mlp_tile_tokens: PositiveInt | None = None
    """Compute MLPs so many tokens at a time, and again in the backward: for long documents. null whole."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Needs a pinned revision for hub models."""
    freeze: tuple[str, ...] = ()
    """Parts that are not trained: modules or weights, * for anything ([embed_tokens, layers.0])."""
    add_tokens: tuple[str, ...] | dict[str, Literal["special", "ordinary"]] = ()
    """Tokens that the tokenizer gets: control tokens, [<|call|>]; or {<|call|>: special, kWh: ordinary}."""
    pad_vocab_multiple: PositiveInt | None = None
    """Embedding and head get rows up to a multiple of this; 64 suits GPUs. Not with an adapter."""


class AdapterConfig(_Section):
    """Train a small adapter instead of the whole model."""

    path: str | None = None
    """Folder of an adapter to go on training; what is not set here is taken from it. null begins anew."""
    kind: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    """Which low-rank adapter."""
    rank: PositiveInt = 64
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 128
    """Scale of the update: alpha / rank (alpha / sqrt(rank) for rslora)."""
    dropout: Part = 0.0
    """Dropout in front of the adapter."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """all-linear (every linear layer but the head), or a list of module names."""
    quantize: Literal["nf4"] | None = None
    """nf4 keeps the frozen base in 4 bits: QLoRA."""


class SourceConfig(_Section):
    """One source of examples."""

    path: str
    """File (jsonl json csv tsv parquet arrow, compressed too), glob, folder, or hub name."""
    name: str | None = None
    """How reports call it; null takes the file's name."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"] = "auto"
    """Shape of a row; auto looks at the columns and check prints what it found."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the blend, with mix: weighted."""
    split: str = "train"
    """Split of a hub dataset or saved dataset folder."""
    max_examples: PositiveInt | None = None
    """Take at most this many rows, the first ones."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name: their name, where columns are called differently."""


def _as_sources(value: Any) -> Any:
    """A path, a list of paths, or a list of sources: always a list of sources."""
    if value is None or isinstance(value, tuple):
        return value
    items = value if isinstance(value, list) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources), Field(min_length=1)]


class DataConfig(_Section):
    """What is trained on, and how rows become tokens and masks."""

    train: Sources
    """One path, a list of paths, or a list of sources."""
    eval: Sources | None = None
    """Held-out data, given as train is."""
    eval_fraction: Part = 0.0
    """Hold out this share of train for evaluation."""
    mix: Literal["concat", "weighted"] = "concat"
    """concat takes every row once an epoch; weighted gives each source its share."""
    max_tokens: PositiveInt = 4096
    """Longest example, in tokens."""
    too_long: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What becomes of a longer one."""
    chat_template: str | None = None
    """A template file or a built-in name; null takes the tokenizer's own."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which turns are learned; a message may say train: false or weight: 0.5 itself."""
    control_tokens: Literal["escape", "allow", "error"] = "escape"
    """What becomes of control tokens that someone typed into a text."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Lay documents end to end; auto does where the model keeps them apart."""
    share_prefix: Literal["auto", "on", "off"] = "auto"
    """Compute once what examples of a forward begin with; auto does where it is exact and pays (on a CPU)."""
    bad_rows: Literal["error", "drop"] = "error"
    """What becomes of a row that cannot be trained on."""
    bad_row_rules: dict[str, Literal["error", "drop", "fix"]] = Field(default_factory=dict)
    """The same per rule, by the rule's name as check prints it."""
    max_bad_fraction: Fraction = 0.01
    """Stop when a larger share of rows than this is bad."""
    cache_dir: str | None = None
    """Where prepared data is kept; null is output_dir's parent/.burnish-cache."""
    num_workers: PositiveInt | Auto = "auto"
    """Processes that prepare data."""


class BatchConfig(_Section):
    """How much an optimizer step sees, and how it is cut. The cut never changes the result."""

    global_examples: PositiveInt | None = None
    """Examples per optimizer step, over all GPUs (128 if global_tokens is not given either)."""
    global_tokens: PositiveInt | None = None
    """Tokens per optimizer step, over all GPUs, instead of global_examples."""
    micro_tokens: PositiveInt | Auto = "auto"
    """Tokens per forward on one GPU; auto follows the memory plan."""
    micro_examples: PositiveInt | None = None
    """Examples per forward on one GPU, instead of micro_tokens."""


class OptimConfig(_Section):
    """The optimizer."""

    name: Literal["adamw", "adamw_8bit", "muon", "adafactor"] = "adamw"
    """adamw; adamw_8bit (needs bitsandbytes); muon (matrices by Muon, the rest by AdamW); adafactor."""
    lr: Annotated[float, Field(gt=0)] = 5e-6
    """Peak learning rate."""
    group_lr: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Factors on the rate by part, named as in model.freeze: {embed_tokens: 0.1}, {lora_B: 16} (LoRA+)."""
    betas: tuple[Part, Part] = (0.9, 0.95)
    """Decay of the running mean and of the running square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay per unit of learning rate; norms and biases are exempt."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; null does not clip."""


class ScheduleConfig(_Section):
    """The learning rate as a function of the step."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the decay after the warm-up; wsd stays at the peak until decay_ratio is left."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the rate rises from 0."""
    min_lr_ratio: Fraction = 0.1
    """The rate at the end, as a share of the peak."""
    decay_ratio: Fraction = 0.1
    """Share of the steps, at the end, over which wsd decays."""


class TrainConfig(_Section):
    """How long, from which seed, and what is learned besides the plain loss (which is what is logged)."""

    epochs: Annotated[float, Field(gt=0, le=MAX_EPOCHS)] = 1
    """Passes over the data; a fraction is allowed."""
    max_steps: PositiveInt | None = None
    """Train for exactly this many optimizer steps, whatever epochs says; the schedule is planned for them."""
    seed: Annotated[int, Field(ge=0, le=10**18)] = 42
    """Of the order of the examples, fresh weights and dropout."""
    max_skipped_steps: PositiveInt = 3
    """Stop (exit code 5) when this many steps in a row had gradients that are not finite."""
    label_smoothing: Part = 0.0
    """Share of each target that is spread evenly over the vocabulary."""
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """Factor of log(sum(exp(logits)))^2, which keeps logits small; 1e-4 is usual."""
    router_aux_loss: Annotated[float, Field(ge=0.0)] | Auto = 0.0
    """Factor of the loss that balances a mixture's experts; auto takes the model's own, 0 leaves it out."""
    neftune_alpha: Annotated[float, Field(gt=0.0)] | None = None
    """Noise on the embeddings in training, alpha / sqrt(document's tokens * width): NEFTune; 5 is usual."""


class EvalConfig(_Section):
    """Evaluation on held-out data."""

    every_steps: PositiveInt | None = None
    """Evaluate every so many steps; null evaluates before the first and after the last only."""


class EngineConfig(_Section):
    """Who runs the step."""

    kind: Literal["auto", "local", "deepspeed"] = "auto"
    """auto: local for one process, DeepSpeed for more or with offloading."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: what is sharded (1 optimizer, 2 gradients too, 3 weights too)."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Keep optimizer state there (nvme: ZeRO 3)."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Keep weights there (ZeRO 3; nvme not in fp32)."""
    nvme_path: str | None = None
    """Folder on a fast disk of every host, for what is on nvme; null takes output_dir."""
    hpz_size: PositiveInt = 1
    """Ranks, best those of one host, that hold all weights among them for the backward (ZeRO 3, hpZ)."""
    sequence_parallel: PositiveInt = 1
    """Ranks that share one long sequence (DeepSpeed Ulysses)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed settings over ours ({comms_logger: {enabled: true}}), none that would change the step."""

    @property
    def offloads(self) -> bool:
        """Whether anything is kept off the GPU."""
        return self.offload_optimizer != "none" or self.offload_params != "none"

    def uses_deepspeed(self, num_ranks: int) -> bool:
        """Whether `kind` means DeepSpeed for so many ranks; only DeepSpeed offloads, on one of them too."""
        return self.kind == "deepspeed" or (self.kind == "auto" and (num_ranks > 1 or self.offloads))


class LaunchConfig(_Section):
    """How many processes."""

    num_processes: PositiveInt | Auto = "auto"
    """auto: one per GPU, one on a machine without."""
    hang_timeout_seconds: Annotated[float, Field(gt=0, le=10**9)] | None = 600.0
    """End the run (exit code 75, stacks saved) when a rank makes no progress for so long; null never."""


# Only what leaves the layout of weights and optimizer state as it is.
ResumableChange = Literal[
    "model.path",
    "model.revision",
    "data",
    "data.mix",
    "data.chat_template",
    "tokenizer",
    "batch.global_examples",
    "batch.global_tokens",
    "train.seed",
]


class CheckpointConfig(_Section):
    """Checkpoints to go on from."""

    every_steps: PositiveInt | None = None
    """Save every so many steps; null saves only when stopped by a signal."""
    keep: PositiveInt = 2
    """How many to keep; the newest and the best always stay."""
    resume: str = "auto"
    """auto: from the newest whole one, if any; never; must; or a checkpoint's folder."""
    allow_changes: tuple[ResumableChange, ...] = ()
    """What may differ from the run that a checkpoint is of, among what is refused (Checkpoints says what)."""


class LogConfig(_Section):
    """What is written down."""

    every_steps: PositiveInt = 1
    """Write every so many steps."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Besides metrics.jsonl, which is always written."""


class Config(_Section):
    """A whole run. Only model.path, data.train and output_dir must be given."""

    model: ModelConfig
    adapter: AdapterConfig | None = None
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    engine: EngineConfig = EngineConfig()
    launch: LaunchConfig = LaunchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    output_dir: str
    """Where the run writes everything."""
