"""The model interface that EleutherAI's lm-evaluation-harness calls (``lm_eval.api.model.LM``).

The harness writes the prompts and scores the answers. ``Asker`` provides likelihoods and texts, and
stores them.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions

ANSWER_TOKENS = 256
"""Longest answer if a task does not say: the harness's own default."""


class ChameleonLM(TemplateLM):
    """A model for the harness.

    Args:
        asker: The model and its stored answers.
        seed: Seed of answers that are sampled.
        batch_size: Prompts that are answered together.
    """

    def __init__(self, asker: Asker, seed: int = 1, batch_size: int = 32) -> None:
        super().__init__()
        self._asker = asker
        self._seed = seed
        self._batch_size = batch_size
        self._vocabulary = asker.session.tokenizer.vocabulary

    @property
    def eot_token_id(self) -> int:
        """``</s>``, which ends a document."""
        return self._vocabulary.eos

    @property
    def prefix_token_id(self) -> int:
        """``<s>``, which begins every document."""
        return self._vocabulary.bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with ``<s>`` in front unless ``add_special_tokens`` is False."""
        token_ids = self._asker.session.tokenizer.text.encode(string)
        return token_ids if add_special_tokens is False else [self._vocabulary.bos, *token_ids]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        empty = next((text for text, _, continuation in requests if not continuation), None)
        if empty is not None:
            what = f"the candidate {empty[1]!r} has no tokens"
            raise DataError("task", what, "Give each candidate some text")
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(s.log_likelihood, s.is_greedy) for s in self._asker.score_ids(pairs)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._asker.session.context_tokens,
                context_len=1,
            )
            found = [make_disjoint_window(window) for window in windows]
            pairs += found
            counts.append(len(found))
        scores = iter(self._asker.score_ids(pairs))
        return [sum(next(scores).log_likelihood for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers in text, cut off where a stop string begins.

        Requests with the same generation options are answered together.
        """
        texts: dict[int, str] = {}
        kinds: dict[GenerationOptions, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(self._options(request.args[1]), []).append(index)
        for options, indices in kinds.items():
            prompts = [[requests[index].args[0]] for index in indices]
            texts.update(zip(indices, self._asker.write(prompts, options), strict=True))
        return [texts[index] for index in range(len(requests))]

    def _options(self, kwargs: dict[str, Any]) -> GenerationOptions:
        draws = kwargs.get("do_sample", kwargs.get("temperature", 0) > 0)
        return GenerationOptions(
            temperature=float(kwargs.get("temperature", 1.0)) if draws else 0.0,
            top_p=float(kwargs.get("top_p", 1.0)),
            top_k=int(kwargs.get("top_k", 0)) if draws else 0,
            repetition_penalty=1.0,
            max_tokens=int(kwargs.get("max_gen_toks", ANSWER_TOKENS)),
            force=Force.TEXT,
            stop=_stops(kwargs.get("until")),
            seed=self._seed,
            batch_size=self._batch_size,
        )


def _stops(until: str | Sequence[str] | None) -> tuple[str, ...]:
    return tuple(filter(None, [until] if isinstance(until, str) else until or []))
