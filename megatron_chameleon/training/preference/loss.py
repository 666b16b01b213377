"""The loss of direct preference optimization (DPO), and what is measured of it.

For a pair of answers to one prompt, of which the first is preferred, with the log-probabilities
that the model and the reference give to their tokens:

    reward(answer) = beta * (log p_model(answer) - log p_reference(answer))
    loss = -log sigmoid(reward(chosen) - reward(rejected))

Source: Rafailov et al., arXiv 2305.18290, equation 7. ``dpo.label_smoothing`` mixes in the loss of
the opposite preference (Mitchell, "A note on DPO with noisy preferences", 2023), and
``dpo.rpo_alpha`` adds the cross-entropy of the chosen answer per token (arXiv 2404.19733).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_chameleon.config.finetuning import DpoConfig
from megatron_chameleon.data.batches.reader import Batch

PAIR_SUMS = (
    *("loss", "pairs", "reward_margin", "reward_accuracy"),
    *("chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp"),
)
"""What ``pair_sums`` adds up. Margin and accuracy are of the rewards; a pair counts as right if the
chosen answer has the higher reward. The last two are log-probabilities of whole answers in nats."""


def answer_log_probs(batch: Batch, cross_entropy: Tensor) -> Tensor:
    """The log-probabilities of the answers of a micro-batch, summed over their tokens.

    Args:
        batch: On this process's device, with pairs.
        cross_entropy: [B, S].

    Returns:
        float64 [pairs, 2]: of the chosen and of the rejected answer.
    """
    # A product with a matrix of ones and zeros adds in a fixed order, unlike index_add_ on a GPU.
    of_tokens = -(cross_entropy * batch.loss_mask).double().reshape(-1)
    return (_answer_matrix(batch) @ of_tokens).reshape(-1, 2)


def preference_loss(
    batch: Batch, output: tuple[Tensor, Tensor, Tensor], z_loss: float, dpo: DpoConfig
) -> tuple[Tensor, Tensor]:
    """The loss, summed over the pairs of a micro-batch. The z-loss of a pair is a mean over tokens.

    Args:
        batch: On this process's device, with pairs.
        output: What the model returned: cross-entropy, log(Z) and largest logit, each [B, S].
        z_loss: Weight of log(Z)^2.
        dpo: The config.

    Returns:
        A scalar, to call ``backward`` on; and without gradient ``PAIR_SUMS``, float64 [8], whose
        loss is without the z-loss.
    """
    cross_entropy, log_z, _ = output
    losses, sums = _losses(batch, cross_entropy, dpo)
    total = losses.sum()
    if z_loss:
        squares = (log_z.square() * batch.loss_mask).double().reshape(-1)
        of_pairs = (_answer_matrix(batch) @ squares).reshape(-1, 2).sum(dim=1)
        total = total + z_loss * (of_pairs / _tokens(batch).sum(dim=1)).sum()
    return total.to(cross_entropy.dtype), sums


def pair_sums(batch: Batch, output: tuple[Tensor, Tensor, Tensor], dpo: DpoConfig) -> Tensor:
    """``PAIR_SUMS`` of a micro-batch, float64 [8], without gradients."""
    return _losses(batch, output[0].detach(), dpo)[1]


def pair_means(sums: list[float]) -> dict[str, float | None]:
    """Means over pairs, by name; None without a pair."""
    named = dict(zip(PAIR_SUMS, sums, strict=True))
    count = named.pop("pairs")
    return {name: value / count if count else None for name, value in named.items()}


def _losses(batch: Batch, cross_entropy: Tensor, dpo: DpoConfig) -> tuple[Tensor, Tensor]:
    """The loss of each pair, float64 [pairs], and ``PAIR_SUMS`` without gradient."""
    assert batch.pairs is not None
    log_probs = answer_log_probs(batch, cross_entropy)
    rewards = dpo.beta * (log_probs - batch.pairs.reference)
    margin = rewards[:, 0] - rewards[:, 1]
    losses = -(1 - dpo.label_smoothing) * logsigmoid(margin)
    if dpo.label_smoothing:
        losses = losses - dpo.label_smoothing * logsigmoid(-margin)
    if dpo.rpo_alpha:
        losses = losses - dpo.rpo_alpha * log_probs[:, 0] / _tokens(batch)[:, 0]
    with torch.no_grad():
        right = (margin > 0).double()
        columns = [losses, torch.ones_like(losses), margin, right, *rewards.T, *log_probs.T]
        sums = torch.stack([column.sum() for column in columns])
    return losses, sums


def _answer_matrix(batch: Batch) -> Tensor:
    """Which tokens belong to which answer: float64 [2 x pairs, B x S] of ones and zeros."""
    assert batch.pairs is not None
    answer = batch.pairs.answer.reshape(1, -1)
    numbers = torch.arange(2 * batch.pairs.count, device=answer.device).unsqueeze(1)
    return (answer == numbers).double()


def _tokens(batch: Batch) -> Tensor:
    """Tokens of each answer: float64 [pairs, 2], at least 1 because ``</s>`` belongs to it."""
    return (_answer_matrix(batch) @ batch.loss_mask.double().reshape(-1)).reshape(-1, 2)
