"""Bytes that a forward keeps for its backward, derived operation by operation. Pure arithmetic.

What autograd keeps of one decoder layer, per token, with residual width h, queries q and keys or values k
wide, an MLP m wide and e bytes an element; three cases, by what the residual stream is kept in:

    fp32        everything in 4 bytes
    autocast    fp32 weights, products in 2 bytes: the stream stays in 4 and every product casts its input
    pure        all weights in 2 bytes (ZeRO, or a frozen base): the stream is in 2, norms compute in 4

    RMSNorm, twice      what is squared (4h); what its trained weight is multiplied with and its output, in
                        the stream's dtype (under autocast only casts of the output are kept)
    inputs of products  one shared by all products of a place, or a cast for each of them under autocast; a
                        frozen product keeps nothing, the adapter beside it the same input, and with dropout
                        one of its own and what was dropped (a byte each, on a CPU the factor)
    attention           query and key after their rotation, which runs in the stream's dtype, value, and the
                        output; on a CPU aten's kernel gives fp32, and hands on a copy in the forward's.
                        Ours (model/native/) keeps all of them in bf16, up to an eighth of a layer less; a
                        plan may be for another machine and does not count on it
    MLP                 gate, up, gate's activation (their product is the down projection's input)

By this a Llama of width 512 with half as many key heads and an MLP of 2.69 widths keeps 60.5 bytes a channel
and layer under autocast on a CPU; 60.9 were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from burnish.config.schema import AdapterConfig, Config
from burnish.plan.shapes import Linear, ModelShape, short_name

_INPUT_OF = {
    "q": "attention", "k": "attention", "v": "attention", "qkv": "attention", "o": "attended",
    "gate": "mlp", "up": "mlp", "gate_up": "mlp", "router": "mlp", "down": "product",
    "shared_gate": "mlp", "shared_up": "mlp", "shared_router": "mlp", "shared_down": "product",
}  # fmt: skip


@dataclass(frozen=True)
class Forward:
    """What the forward of a rank computes in."""

    element: int
    """Bytes of a product's input and output."""
    stream: int
    """Bytes of an element of the residual stream."""
    autocast: bool
    """Trained weights are fp32 and cast for each product."""
    adapter: AdapterConfig | None
    on_cpu: bool

    def keeps_input(self, matrix: Linear) -> bool:
        """Whether a product's input is needed for a gradient: of the matrix, or of an adapter beside it."""
        if self.adapter is None:
            return True
        if self.adapter.targets == "all-linear":
            return matrix.rank_factor > 0
        return matrix.name in {short_name(target) for target in self.adapter.targets}


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch's activations on one rank."""

    kept: int
    """By all layers, from their forward to their backward."""
    again: int
    """Of the layer, or of the MLP's tile, that the backward computes again."""
    backward: int
    """Gradients inside one layer while the backward is in it."""
    host: int
    """Waiting in the host's memory."""


def layer_bytes_per_token(forward: Forward, shape: ModelShape) -> tuple[int, int]:
    """What one layer keeps per token with no recomputation: outside its MLP, and inside.

    A mixture's experts count as often as a token runs through them.
    """
    e, hidden, query, kv = forward.element, shape.hidden_size, shape.query_size, shape.kv_size
    norms = 2 * (4 + (forward.stream if forward.adapter is None else 0)) * hidden
    # Kernels that want 2 bytes keep casts of what the rotation gave.
    rotated = forward.stream if forward.on_cpu else e
    attention = rotated * (query + kv) + e * kv + (4 if forward.on_cpu else e) * query
    gates = (3 if shape.gated_mlp else 1) * e * shape.mlp_width
    outside = norms + attention + _input_bytes(forward, shape, {"attention": hidden, "attended": query})
    inside = gates + _input_bytes(forward, shape, {"mlp": hidden, "product": shape.mlp_width})
    return outside, inside


def _input_bytes(forward: Forward, shape: ModelShape, widths: Mapping[str, int]) -> int:
    """Of the inputs that a layer's products keep, at these places, and of what adapters put between."""
    total = 0
    for place, width in widths.items():
        names = {m.name for m in shape.layers[0] if _INPUT_OF.get(m.name) == place and forward.keeps_input(m)}
        if not names:
            continue
        casts = forward.autocast and forward.adapter is None and place in ("attention", "mlp")
        drops = forward.adapter is not None and forward.adapter.dropout > 0
        # The attention's output is kept by the attention already, where it is not copied to another dtype.
        is_kept = place == "attended" and not casts and (not forward.on_cpu or forward.element == 4)
        copies = len(names) if casts or drops else 1 - is_kept
        total += copies * forward.element * width
        total += len(names) * width * (forward.element if forward.on_cpu else 1) if drops else 0
        total += forward.element * forward.adapter.rank * len(names) if forward.adapter else 0
    return total


def light_bytes_per_token(forward: Forward, shape: ModelShape) -> int:
    """What `light` keeps in one layer besides its input, per token.

    The results of its matrix products (query, key, value, output; gate, up and down) in the forward's dtype,
    and the attention's, in fp32 on a CPU. 26.8 bytes a channel with the input's 4 for the Llama above, 27.0
    measured.
    """
    products = shape.query_size + 2 * shape.kv_size + 2 * shape.hidden_size
    products += (2 if shape.gated_mlp else 1) * shape.mlp_width
    return forward.element * products + (4 if forward.on_cpu else forward.element) * shape.query_size


def activations(config: Config, forward: Forward, shape: ModelShape, rows: int) -> Activations:
    """Activations of a micro-batch of `rows` tokens.

    Args:
        config: Level of recomputation and tile of the MLP.
        forward: What is computed in.
        shape: The model.
        rows: Tokens on this rank, padding included.
    """
    outside, inside = layer_bytes_per_token(forward, shape)
    light, stream = light_bytes_per_token(forward, shape), forward.stream * shape.hidden_size
    num, level, tile = shape.num_layers, config.model.activation_checkpointing, config.model.mlp_tile_tokens
    # A layer's backward: of the MLP's inner widths three gradients at once, of the stream two.
    backward = rows * (3 * forward.element * shape.mlp_width + 2 * forward.stream * shape.hidden_size)
    one_tile = 0
    if tile is not None and tile < rows:  # nothing inside an MLP is kept, and one tile of it computed again
        one_tile, inside = tile * inside, forward.element * shape.hidden_size
        backward = rows * 3 * forward.stream * shape.hidden_size
        down = (2 if shape.gated_mlp else 1) * shape.mlp_width
        light -= forward.element * (down + shape.hidden_size)
    # The last norm keeps what a layer's norm does, and its output goes to the head.
    last = rows * (4 + forward.stream) * shape.hidden_size
    layer = outside + inside
    if level == "light":
        return Activations(
            rows * num * (stream + light) + last, rows * (layer - light) + one_tile, backward, 0
        )
    if level == "full":
        return Activations(rows * num * stream + last, rows * layer + one_tile, backward, 0)
    if level == "offload":
        on_device = rows * min(2, num) * stream
        return Activations(on_device + last, rows * layer + one_tile, backward, rows * num * stream)
    return Activations(rows * num * layer + last, one_tile, backward, 0)
