"""The losses of a reward model.

Shapes: P pairs, B texts. ``chosen`` and ``rejected`` (P,) are the scores of both sides of each pair.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor, weight: Tensor, center: float = 0.0) -> Tensor:
    """The loss of preferences: sum over pairs of weight * (-log sigmoid(chosen - rejected - margin) + center * mean).

    The first term is the model of Bradley and Terry (1952), with the margin of Llama 2 (Touvron et al. 2023, equation
    2): a pair that is labelled as clearer must be told apart further. The second, (chosen + rejected)^2, keeps scores
    around zero, which differences alone leave open (Eisenstein et al. 2023, equation 2).

    Args:
        margin: how much better the chosen side is, in units of the score; 0 where the data does not say. (P,)
        weight: of each pair; they sum to 1. (P,)
        center: weight of the second term.
    """
    losses = -F.logsigmoid(chosen - rejected - margin)
    if center:
        losses = losses + center * (chosen + rejected) ** 2
    return (weight * losses).sum()


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """The loss of ratings: the mean over B texts of (predicted - target)^2; 1 for the mean of standardised targets."""
    return F.mse_loss(predicted, target)


def ranking_weights(sizes: list[int]) -> list[float]:
    """The weight of each pair of a batch of R rankings: 1 / (R * pairs of its ranking).

    A ranking of K responses has C(K, 2) pairs, and the weight 1 / C(K, 2) is that of InstructGPT (Ouyang et al. 2022,
    equation 1): every ranking counts the same, however many responses it has. Where two responses tie, their pair is
    not there, and the others share its weight. Pairs by themselves are rankings of two.

    Args:
        sizes: pairs of each ranking. (R,)
    """
    return [1.0 / (len(sizes) * size) for size in sizes for _ in range(size)]
