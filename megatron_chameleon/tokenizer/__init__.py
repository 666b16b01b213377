"""Tokenizers: text (sentencepiece BPE), images (VQGAN) and the vocabulary that joins them.

``chameleon tokenizer text`` and ``chameleon tokenizer image`` make a tokenizer folder,
``load_tokenizer`` reads it. Names are imported on first use, so that a program that needs only the
vocabulary does not have to import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
    from megatron_chameleon.tokenizer.folder import Tokenizer, fingerprint, load_tokenizer
    from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer
    from megatron_chameleon.tokenizer.text.tokenizer import TextTokenizer

__all__ = [
    "ImageTokenizer",
    "TextTokenizer",
    "Tokenizer",
    "Vocabulary",
    "fingerprint",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    homes = {
        "ImageTokenizer": "image.tokenizer",
        "TextTokenizer": "text.tokenizer",
        "Vocabulary": "common.vocabulary",
    }
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes.get(name, 'folder')}"), name)
