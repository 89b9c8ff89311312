"""What the gradient is of, besides the plain loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from burnish.config.schema import TrainConfig


@dataclass(frozen=True)
class Objective:
    """Terms that training adds to `sum(weight * nll)`.

    For each supervised token, with `p` the softmax of its logits over V words:

        (1 - label_smoothing) * nll + label_smoothing * mean_v(-log p_v) + z_loss * logsumexp(logits)^2

    and for each document `router_aux_loss` times its load-balancing loss, weighted like its tokens.
    Everything is summed over a window and divided by its weight, so a factor counts once a step,
    however the window was cut. Evaluation, and the loss that is logged, are the plain one.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    router_aux_loss: float | Literal["auto"] = 0.0
    """auto is the model's own `router_aux_loss_coef`."""
    neftune_alpha: float | None = None
    """Noise on the embeddings in training."""

    @staticmethod
    def of(train: TrainConfig) -> Objective:
        """As the config says."""
        return Objective(train.label_smoothing, train.z_loss, train.router_aux_loss, train.neftune_alpha)


PLAIN = Objective()
"""Nothing but `sum(weight * nll)`."""
