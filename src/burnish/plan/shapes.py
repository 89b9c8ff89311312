"""What a model is made of, read off its config.json: parameters, FLOPs, what an adapter adds. No torch.

Counts are exact for the families in `FAMILIES` (a test compares them with transformers). Any other model
is taken for a Llama with the same widths, and `ModelShape.exact` is False.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from burnish.config.schema import AdapterConfig
from burnish.errors import ConfigError, Problem
from burnish.plan.counts import CostModel
from burnish.records import Vocabulary


@dataclass(frozen=True)
class Linear:
    """Equal matrices of one layer."""

    name: str
    d_in: int
    d_out: int
    bias: bool = False
    copies: int = 1
    """Experts have many."""
    active: int = 1
    """Of those, how many a token runs through."""
    rank_factor: int = 1
    """Rank of an adapter on it, over `adapter.rank`: peft doubles it for experts' fused gate and up, and
    leaves out what is no linear layer (0)."""

    @property
    def num_params(self) -> int:
        """Weights and biases of all copies."""
        return self.copies * (self.d_in * self.d_out + self.bias * self.d_out)


@dataclass(frozen=True)
class Family:
    """How layers of a `model_type` differ from Llama's."""

    qkv_bias: bool | None = None
    """None: as `attention_bias` says."""
    out_bias: bool | None = None
    gated_mlp: bool = True
    mlp_bias: bool | None = None
    """None: as `mlp_bias` says."""
    num_norms: int = 2
    norm_vectors: int = 1
    """2 with a bias, 0 for a norm without parameters."""
    qk_norm: Literal["none", "head", "full"] = "none"
    fused_qkv: bool = False
    fused_mlp: bool = False
    grouped: bool = True
    """Whether there is such a thing as `num_key_value_heads`."""
    adapted_experts: bool = False
    """Whether peft (0.21) adapts router and experts with all-linear."""
    head_bias: bool = False
    tied: bool = False
    """When config.json does not say."""
    head_dim: int | None = None
    """When config.json does not say; None is width / heads."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, out_bias=False, mlp_bias=False),
    "mixtral": Family(qkv_bias=False, out_bias=False, mlp_bias=False, adapted_experts=True),
    "qwen2": Family(qkv_bias=True, out_bias=False, mlp_bias=False),
    "qwen2_moe": Family(qkv_bias=True, out_bias=False, mlp_bias=False),
    "qwen3": Family(mlp_bias=False, qk_norm="head", head_dim=128),
    "qwen3_moe": Family(mlp_bias=False, qk_norm="head", adapted_experts=True),
    "gemma": Family(mlp_bias=False, tied=True, head_dim=256),
    "gemma2": Family(mlp_bias=False, num_norms=4, tied=True, head_dim=256),
    "gemma3_text": Family(mlp_bias=False, num_norms=4, qk_norm="head", tied=True, head_dim=256),
    "phi3": Family(qkv_bias=False, out_bias=False, mlp_bias=False, fused_qkv=True, fused_mlp=True),
    "olmo": Family(mlp_bias=False, norm_vectors=0),
    "olmo2": Family(mlp_bias=False, qk_norm="full"),
    "olmo3": Family(mlp_bias=False, qk_norm="full"),
    "granite": Family(),
    "smollm3": Family(tied=True),
    "cohere": Family(mlp_bias=False, num_norms=1, tied=True),
    "cohere2": Family(mlp_bias=False, num_norms=1, tied=True, head_dim=128),
    "starcoder2": Family(True, True, False, True, 2, 2, tied=True),
    "phi": Family(True, True, False, True, 1, 2, head_bias=True),
    "gpt_neox": Family(True, True, False, True, 2, 2, fused_qkv=True, grouped=False),
    "gpt2": Family(True, True, False, True, 2, 2, fused_qkv=True, grouped=False, tied=True),
}

_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model", "emb_dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"),
}
"""What GPT-2 and others call it: a config.json has only its family's own name."""
_LISTED = ("intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelShape:
    """Widths and matrices of a causal language model."""

    model_type: str
    hidden_size: int
    num_layers: int
    query_size: int
    """Heads times head width."""
    kv_size: int
    vocab_size: int
    tied: bool
    layers: tuple[tuple[Linear, ...], ...]
    """Linear layers of each transformer layer."""
    norm_params_per_layer: int
    other_params: int
    """Learned positions, the last norm, the head's bias."""
    exact: bool
    """Whether parameter counts are known for this family, or estimated."""
    new_tokens: tuple[int, ...] = ()
    """Tokens whose rows an adapter trains too."""
    kept_params: int = 0
    """Frozen weights beside the language model (a vision part), which are in memory and never run."""
    kept_matrices: int = 0
    """Of those, the weights of linear layers, which quantisation packs."""

    def beside(self, kept_params: int, kept_matrices: int) -> ModelShape:
        """The shape of the language model in a checkpoint that has these weights besides."""
        return replace(self, kept_params=kept_params, kept_matrices=kept_matrices)

    def grown(self, vocabulary: Vocabulary) -> ModelShape:
        """The shape with the rows that a tokenizer asks for."""
        rows = vocabulary.num_rows(self.vocab_size)
        family = FAMILIES.get(self.model_type, Family())
        other = self.other_params + (rows - self.vocab_size) * family.head_bias
        fresh = vocabulary.fresh(self.vocab_size)
        return replace(self, vocab_size=rows, other_params=other, new_tokens=fresh)

    @property
    def embedding_params(self) -> int:
        """Of the token embedding, which the head shares where `tied`."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_params(self) -> int:
        """Of all transformer layers."""
        linear = sum(matrix.num_params for layer in self.layers for matrix in layer)
        return linear + self.num_layers * self.norm_params_per_layer

    @property
    def num_params(self) -> int:
        """Of the whole language model, a tied head counted once."""
        return self.layer_params + self.embedding_params * (1 if self.tied else 2) + self.other_params

    @property
    def active_layer_weights(self) -> int:
        """Matrix weights of the layers that one token is multiplied with (experts: the chosen)."""
        return sum(m.d_in * m.d_out * m.active for layer in self.layers for m in layer)

    @property
    def mlp_width(self) -> int:
        """Sum of the widths inside a layer's MLP that a token runs through."""
        down = [m for m in self.layers[0] if m.name in ("down", "shared_down")]
        return sum(m.d_in * m.active for m in down)

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP has a gate (SwiGLU and kin)."""
        return any(m.name in ("gate", "gate_up") for m in self.layers[0])

    def lora_params(self, adapter: AdapterConfig) -> int:
        """What the adapter adds: `rank * (in + out)` a matrix, with DoRA one magnitude a row, and the
        rows of new tokens.

        With a list of targets that names none of the known matrices this is all-linear's number.
        """
        matrices = [m for layer in self.layers for m in layer]
        if adapter.targets != "all-linear":
            wanted = {short_name(target) for target in adapter.targets}
            matrices = [m for m in matrices if m.name in wanted] or matrices
        dora = adapter.kind == "dora"
        rows = len(self.new_tokens) * self.hidden_size * (1 if self.tied else 2)
        return rows + sum(
            m.copies
            * (adapter.rank * m.rank_factor * (m.d_in + m.d_out) + (dora and m.rank_factor) * m.d_out)
            for m in matrices
        )

    def cost_model(self) -> CostModel:
        """FLOPs of the forward per token and per token squared: matrices, and causal attention.

        A multiply-add is 2 FLOPs; causal attention is two products of `T^2 / 2 * query_size` each.
        """
        return CostModel(
            per_token=2.0 * (self.active_layer_weights + self.embedding_params),
            per_token_squared=2.0 * self.num_layers * self.query_size,
        )

    @staticmethod
    def from_config_json(config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face config.json.

        Raises:
            ConfigError: It lacks a width.
        """
        text = config.get("text_config")
        keys: dict[str, Any] = dict(text) if isinstance(text, Mapping) else dict(config)
        keys |= dict(_under_our_names(keys))
        model_type = str(keys.get("model_type", config.get("model_type", "unknown")))
        needed = ["hidden_size", "num_hidden_layers", "vocab_size"]
        if model_type in FAMILIES:  # of others there are some without attention
            needed.append("num_attention_heads")
        missing = [key for key in needed if not isinstance(keys.get(key), int)]
        if missing:
            raise ConfigError(
                *(Problem("model.path", f"its config.json has no {key}", _CURE) for key in missing)
            )
        return _shape(keys, model_type, exact=model_type in FAMILIES and text is None)


def _under_our_names(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Sizes that a config.json has under another name."""
    for ours, theirs in _OTHER_NAMES.items():
        if keys.get(ours) is None or "n_embd" in keys:  # GPT-2's kin read nothing under ours
            yield ours, next((keys[name] for name in theirs if isinstance(keys.get(name), int)), None)
    kinds = keys.get("layers_block_type")  # Nemotron-H has a list instead of a number
    if keys.get("num_hidden_layers") is None and isinstance(kinds, Sequence):
        yield "num_hidden_layers", len(kinds)


_CURE = "Planning needs the config.json of a causal language model."


def short_name(target: str) -> str:
    """Our name of a matrix, from the last part of a module's name."""
    last = target.rsplit(".", 1)[-1]
    named = {
        "out_proj": "o", "dense": "o", "c_attn": "qkv", "query_key_value": "qkv", "c_fc": "up",
        "fc1": "up", "fc2": "down", "dense_h_to_4h": "up", "dense_4h_to_h": "down",
    }  # fmt: skip
    return named.get(last, last.removesuffix("_proj"))


def _shape(keys: Mapping[str, Any], model_type: str, exact: bool) -> ModelShape:
    family = FAMILIES.get(model_type, Family())
    hidden, heads = keys["hidden_size"], _num_heads(keys)
    head_dim = keys.get("head_dim") or family.head_dim or hidden // max(1, heads)
    kv_heads = (keys.get("num_key_value_heads") if family.grouped else None) or heads
    query, kv = heads * head_dim, min(heads, kv_heads) * head_dim
    attention = _attention(keys, family, hidden, query, kv) if heads else ()
    layers = tuple(
        attention + _mlp(_of_layer(keys, layer), family, hidden, layer)
        for layer in range(keys["num_hidden_layers"])
    )
    qk_norm = {"none": 0, "head": 2 * head_dim, "full": query + kv}[family.qk_norm]
    if model_type == "cohere" and keys.get("use_qk_norm"):
        qk_norm = query + kv  # one weight for each head and channel
    other = hidden * family.norm_vectors
    if model_type == "gpt2":
        other += keys.get("n_positions", 1024) * hidden
    if family.head_bias:
        other += keys["vocab_size"]
    return ModelShape(
        model_type=model_type,
        hidden_size=hidden,
        num_layers=keys["num_hidden_layers"],
        query_size=query,
        kv_size=kv,
        vocab_size=keys["vocab_size"],
        tied=bool(keys.get("tie_word_embeddings", family.tied)),
        layers=layers,
        norm_params_per_layer=family.num_norms * family.norm_vectors * hidden + qk_norm,
        other_params=other,
        exact=exact and not any(key in keys for key in ("q_lora_rank", "kv_lora_rank")),
    )


def _num_heads(keys: Mapping[str, Any]) -> int:
    """0 where layers are no attention: Mamba and kin, whose heads, if any, are of another kind."""
    return 0 if "state_size" in keys else keys.get("num_attention_heads") or 0


def _of_layer(keys: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The keys with the numbers of one layer, where there is a list of them (Gemma 3n's widths)."""
    num = keys["num_hidden_layers"]
    listed = {name: keys[name] for name in _LISTED if isinstance(keys.get(name), Sequence)}
    return {**keys, **{name: v[layer] if len(v) == num else max(v) for name, v in listed.items()}}


def _attention(
    keys: Mapping[str, Any], family: Family, hidden: int, query: int, kv: int
) -> tuple[Linear, ...]:
    bias = bool(keys.get("attention_bias", False))
    qkv_bias = bias if family.qkv_bias is None else family.qkv_bias
    out_bias = bias if family.out_bias is None else family.out_bias
    if keys.get("use_bias") is False:  # StarCoder2 has one switch for all
        qkv_bias = out_bias = False
    out = Linear("o", query, hidden, out_bias)
    if family.fused_qkv:
        return (Linear("qkv", hidden, query + 2 * kv, qkv_bias), out)
    return (
        Linear("q", hidden, query, qkv_bias),
        Linear("k", hidden, kv, qkv_bias),
        Linear("v", hidden, kv, qkv_bias),
        out,
    )


def _mlp(keys: Mapping[str, Any], family: Family, hidden: int, layer: int) -> tuple[Linear, ...]:
    intermediate = keys.get("intermediate_size") or keys.get("expand", 4) * hidden
    num_experts = next((keys[key] for key in _EXPERT_KEYS if keys.get(key)), 0)
    if num_experts and keys.get("is_moe") is not False and _is_sparse(keys, layer):
        width = keys.get("moe_intermediate_size") or intermediate
        return _experts(keys, family, hidden, width, num_experts)
    bias = bool(keys.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias
    if keys.get("use_bias") is False:
        bias = False
    down = Linear("down", intermediate, hidden, bias)
    if not family.gated_mlp:
        return (Linear("up", hidden, intermediate, bias), down)
    if family.fused_mlp:
        return (Linear("gate_up", hidden, 2 * intermediate, bias), down)
    return (Linear("gate", hidden, intermediate, bias), Linear("up", hidden, intermediate, bias), down)


def _is_sparse(keys: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of a mixture has experts: every `decoder_sparse_step`-th, less `mlp_only_layers`."""
    return layer not in (keys.get("mlp_only_layers") or ()) and (
        (layer + 1) % keys.get("decoder_sparse_step", 1) == 0
    )


def _experts(
    keys: Mapping[str, Any], family: Family, hidden: int, width: int, num: int
) -> tuple[Linear, ...]:
    once, twice = (1, 2) if family.adapted_experts else (0, 0)
    chosen = keys.get("num_experts_per_tok") or 2
    experts: tuple[Linear, ...] = (
        Linear("router", hidden, num, rank_factor=once),
        Linear("gate_up", hidden, 2 * width, copies=num, active=chosen, rank_factor=twice),
        Linear("down", width, hidden, copies=num, active=chosen, rank_factor=once),
    )
    shared = keys.get("shared_expert_intermediate_size")
    if shared:
        experts += (
            Linear("shared_gate", hidden, shared),
            Linear("shared_up", hidden, shared),
            Linear("shared_down", shared, hidden),
            Linear("shared_router", hidden, 1),
        )
    return experts
