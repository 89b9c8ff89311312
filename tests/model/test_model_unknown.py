"""An architecture that nobody has seen yet: it falls into the safe path by itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from breadth.batches import make_documents
from breadth.checks import YES, compared, ours, reference
from burnish.errors import ConfigError
from burnish.model.attention import can_isolate


class Smear(nn.Module):
    """Mixes each token's state with the one before: a state that knows no documents."""

    def __init__(self, width: int, ahead: bool = False) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((width,), 0.5))
        self.ahead = ahead

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        moved = (
            functional.pad(states, (0, 0, 0, 1))[:, 1:]
            if self.ahead
            else functional.pad(states, (0, 0, 1, 0))[:, :-1]
        )
        return states + self.share * moved


class TomorrowModel(LlamaModel):
    """Llama with such a mixing of its last states."""

    ahead = False

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.smear = Smear(config.hidden_size, self.ahead)

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.last_hidden_state = self.smear(outputs.last_hidden_state)
        return outputs


class TomorrowForCausalLM(LlamaForCausalLM):
    """And with a head that does something new to its logits."""

    body = TomorrowModel

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = self.body(config)
        self.post_init()

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + 0.1 * outputs.logits.sin()
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size)
        return outputs


class LookingAheadModel(TomorrowModel):
    ahead = True


class LookingAheadForCausalLM(TomorrowForCausalLM):
    body = LookingAheadModel


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        pad_token_id=0,
    )


def fresh(architecture=TomorrowForCausalLM):
    torch.manual_seed(0)
    return architecture(config()).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_architecture_that_leaks_is_padded_and_keeps_its_own_head(dtype):
    """In bf16 the trial runs on a small model of the same class."""
    capability = can_isolate(fresh().to(dtype))
    assert not capability.packed and "neighbour" in capability.reason
    assert not capability.fused_head


def test_and_is_trained_right():
    documents, model = make_documents(), fresh()
    found = ours(model, can_isolate(model), documents)
    assert compared(found, reference(fresh(), documents)) == YES


def test_packing_it_all_the_same_is_refused():
    with pytest.raises(ConfigError, match="neighbour"):
        can_isolate(fresh(), packing="on")


def test_one_that_looks_ahead_is_refused():
    with pytest.raises(ConfigError, match="not causal"):
        can_isolate(fresh(LookingAheadForCausalLM))
