"""The loss of written answers: their first letter weighs more, since it is learned last."""

from torch import Tensor


def letter_weighted(nats: Tensor, learned: Tensor, is_letter: Tensor, weight: float) -> tuple[Tensor, float]:
    """Mean nats per learned token, each answer's first letter weighted; and the mean nats of that letter alone.

    Args:
        nats: [B, L] of each token.
        learned: [B, L] true or 1 where a token is part of the answer.
        is_letter: bool [B, L] true where an answer has a letter.
        weight: of the first letter; other tokens have 1.
    """
    first_letter = (is_letter & (is_letter.cumsum(1) == 1)).float()
    loss = (nats * learned * (1 + (weight - 1) * first_letter)).sum() / learned.sum()
    return loss, float((nats.detach() * first_letter).sum() / first_letter.sum())
