"""Log-likelihoods of continuations, against Hugging Face's forward pass of one text at a time."""

import pytest
import torch

from megatron_chameleon.evaluation.asking.likelihood import ContinuationScore, score_continuations
from megatron_chameleon.inference.session import Session

TEXTS = [
    ("a handwritten", " three"),
    ("a handwritten", " four, digit number 4"),
    ("digit", " n"),
    ("digit number 4" * 20, " four"),
    ("x", "y"),
]


def encode(session: Session, context: str, continuation: str) -> tuple[list[int], list[int]]:
    text = session.tokenizer.text
    return [session.tokenizer.vocabulary.bos, *text.encode(context)], text.encode(continuation)


def alone(session: Session, context: list[int], continuation: list[int]) -> ContinuationScore:
    """The score of one pair alone; the forward pass of transformers masks image codes itself."""
    token_ids = torch.tensor([context + continuation])
    with torch.inference_mode():
        logits = session.model(input_ids=token_ids).logits[0, len(context) - 1 : -1].float()
    target = torch.tensor(continuation)
    chosen = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return ContinuationScore(float(chosen), bool((logits.argmax(-1) == target).all()))


def test_scores_are_those_of_single_forwards(session: Session) -> None:
    pairs = [encode(session, *texts) for texts in TEXTS]
    first = pairs[0][0]
    with torch.inference_mode():
        likeliest = int(session.model(input_ids=torch.tensor([first])).logits[0, -1].argmax())
    pairs.append((first, [likeliest]))
    expected = [alone(session, *pair) for pair in pairs]
    for batch_tokens, block_positions in ((16_384, 256), (100, 2), (1, 1)):
        scores = score_continuations(session, pairs, batch_tokens, block_positions)
        for score, one in zip(scores, expected, strict=True):
            assert score.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-5)
            assert score.is_greedy == one.is_greedy
    assert [score.is_greedy for score in expected] == [False] * 5 + [True]


def test_long_contexts_lose_their_beginning(session: Session) -> None:
    context, continuation = encode(session, "a handwritten three " * 200, " four")
    kept = context[-(session.context_tokens + 1 - len(continuation)) :]
    assert len(kept) < len(context)
    (score,) = score_continuations(session, [(context, continuation)])
    expected = alone(session, kept, continuation).log_likelihood
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_candidates_with_the_same_inputs_share_a_forward_pass(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    forward = session.model.model.forward

    def count(input_ids: torch.Tensor, **kwargs: object) -> object:
        rows.append(input_ids.shape[0])
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(session.model.model, "forward", count)
    context, _ = encode(session, "a handwritten", "")
    score_continuations(session, [(context, [token_id]) for token_id in (100, 101, 102, 103)])
    assert rows == [1]
