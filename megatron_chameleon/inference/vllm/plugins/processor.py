"""The rules as vLLM's logits processor. Its name goes to vLLM's ``logits_processors``.

An entry point of vLLM would not do: the V1 runner would not keep the rows' tokens up to date.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor

from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.inference.vllm.plugins.row_request import RowRequest
from megatron_chameleon.inference.vllm.plugins.rules import Rules
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.folder import codes_of_picture

UNSUPPORTED = ("min_tokens", "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs")
"""Parameters of vLLM that change logits before the rules see them."""


class ChameleonProcessor(V1Processor, V2Processor):
    """Both of vLLM's interfaces around ``Rules``; each runner calls its own half."""

    def __init__(self, vllm_config: Any, where: Any, is_pin_memory: bool = False) -> None:
        """``where`` is a device for V1, and the states of the requests for V2."""
        config = vllm_config.model_config
        self.states = None if isinstance(where, torch.device) else where
        device = where if self.states is None else self.states.device
        vocabulary = Vocabulary.load(config.model)
        classes = TokenClasses(vocabulary, device)
        codes_per_image = codes_of_picture(config.model)
        places = vllm_config.scheduler_config.max_num_seqs
        if self.states is not None:
            places = self.states.max_num_reqs
        form = ImageForm(vocabulary, codes_per_image)
        self.rules = Rules(classes, form, config.max_model_len, places)

    @classmethod
    def validate_params(cls, params: Any) -> None:
        """Refuse a request before it reaches the engine.

        Raises:
            ValueError: A parameter cannot be combined with the rules.
        """
        RowRequest.of(params.extra_args)
        for name in UNSUPPORTED:
            if getattr(params, name, None):
                raise ValueError(f"{name} cannot be combined with the rules of images and text")

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """fp32 [rows, vocabulary] with one token left in each row."""
        if context is None:
            return self.rules.apply_v1(logits)
        return self.rules.apply_v2(logits, context, self.states)

    # V1

    def is_argmax_invariant(self) -> bool:
        """No: vLLM must call ``apply`` before it takes the most likely token."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Called before each step."""
        self.rules.update_rows(batch_update)

    # V2

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A slot has a new request, or one that was preempted and comes back."""
        assert self.states is not None
        prompt_tokens = int(self.states.prompt_len.np[req_idx])
        self.rules.put(req_idx, self.rules.row(sampling_params, prompt_tokens))
        return True
