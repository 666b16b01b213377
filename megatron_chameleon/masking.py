"""Mask secrets in texts that are written to files, logs and error messages.

    chameleon train x.yaml logging.wandb_project=p WANDB_API_KEY=0123...   # a word of the command
    https://user:password@host/data.jsonl                                  # an input

A run folder is often shared, and a token in ``command.txt`` would be shared with it. What looks
like a secret is replaced by ``***``: tokens with a known form, values behind a name such as
``api_key``, and passwords in URLs. Secrets of an unknown form and name cannot be found, so files
that record what a user typed are readable by their owner only.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

MASK = "***"

# The forms that the services document. A token keeps its prefix, which says whose it is. Most have
# no separators, unlike names such as hf_tokenizer_2024 and sk-learn-datasets.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?P<prefix>"
    r"(?:hf_|api_org_|gh[oprsu]_|npm_|r8_|gsk_|dop_v1_|sk-|AKIA|ASIA)(?=[A-Za-z0-9]{16})"
    r"|(?:sk-(?:proj|ant|svcacct|or|admin)-|github_pat_|glpat-|xox[abeoprs]-|AIza|ya29\.|pypi-|nvapi-"
    r"|wandb_v1_)(?=[A-Za-z0-9_\-.]{16})"
    r"|eyJ(?=[\w\-]{8,400}\.[\w\-]{8,400}\.))[A-Za-z0-9_\-.]+"
)
# Every pattern takes linear time, because an error may quote a megabyte of somebody's document.
# In this project most "tokens" are none of these: tokenizer, max_tokens, eos_token.
_NAMES = (
    r"(?:api[_\-]?key|access[_\-]?key(?:[_\-]?id)?|secret[_\-]?(?:access[_\-]?)?key"
    r"|private[_\-]?key|client[_\-]?secret|secret|password|passwd|passphrase|pwd|credentials?"
    r"|(?:api|auth|access|hub|hf|gh|github|gitlab|wandb|bearer|session|security|refresh|secret|bot)"
    r"[_\-]?token)"
)
_NAMED = re.compile(
    rf"(?P<before>(?<![^\s'\"])--?(?:[\w.\-]{{0,40}}{_NAMES}|token)(?:=|\s+)"
    rf"|{_NAMES}['\"]?\s{{0,4}}[=:]\s{{0,4}}|(?<![a-z_])token=(?=\S{{8}}))"
    r"(?P<quote>['\"]?)(?P<value>[^\s'\"&,;)}\]]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<before>\b(?:Bearer|Basic)\s+)[A-Za-z0-9_\-.=+/]{12,}", re.IGNORECASE)
_URL = re.compile(r"(?P<before>://)[^\s/@'\"]{1,400}@")
_QUERY = re.compile(
    r"(?P<before>[?&](?:X-Amz-(?:Signature|Credential|Security-Token)|sig|signature|sv_sig|key|token"
    r"|access_token|AWSAccessKeyId)=)[^\s&'\"]+",
    re.IGNORECASE,
)
# wandb's older API keys; hashes of ours have 16 or 64 digits
_HEX = re.compile(r"(?<![0-9A-Za-z/_.\-])[0-9a-f]{40}(?![0-9A-Za-z])")
_SECRET_NAME = re.compile(rf"(?:[\w.\-]*{_NAMES}|token|[a-z_]*netrc|[a-z_]*cookie)", re.IGNORECASE)
_PLAIN = {"null", "none", "true", "false", "~", "", MASK}
# "/etc/passwd: the image cannot be read": a message goes on behind the name, no value stands there
_MESSAGE_WORDS = {"a", "an", "the", "it", "its", "is", "no", "not", "this", "there", "has", "must"}


# The path of a webhook's address is its secret. The first form is any address in the config's key,
# the second the services whose addresses are known.
_WEBHOOK = re.compile(
    r"(?P<before>\bon_event['\"]?\s{0,4}[=:]\s{0,4}['\"]?https?://[^\s/?#'\"]{1,400}[/?#]"
    r"|https://(?:hooks\.slack\.com/(?:services|workflows|triggers)/"
    r"|(?:\w{1,20}\.)?discord(?:app)?\.com/api/webhooks/|api\.telegram\.org/bot"
    r"|[\w\-]{1,80}\.webhook\.office\.com/|chat\.googleapis\.com/v1/spaces/"
    r"|hooks\.zapier\.com/hooks/|maker\.ifttt\.com/trigger/))[^\s'\",;)}\]]+",
    re.IGNORECASE,
)


def mask_address(address: str) -> str:
    """The scheme and the host of an address, without what may be secret.

    >>> mask_address("https://me:pw@hooks.example:8443/services/T0/B0/abc")
    'https://hooks.example:8443/***'
    """
    scheme, _, rest = address.strip().partition("://")
    host = re.split(r"[/?#\\]", rest, maxsplit=1)[0].rpartition("@")[2]
    return f"{scheme}://{host}/{MASK}" if rest != host else f"{scheme}://{host}"


def mask_secrets(text: str) -> str:
    """The text with ``***`` in place of what looks like a secret.

    >>> mask_secrets("--api-key abc123 https://me:pw@host/x hf_abcdefghijklmnopqrstuvwx seed=1")
    '--api-key *** https://***@host/x hf_*** seed=1'
    """
    text = _URL.sub(rf"\g<before>{MASK}@", text)
    text = _WEBHOOK.sub(rf"\g<before>{MASK}", text)
    text = _QUERY.sub(rf"\g<before>{MASK}", text)
    text = _TOKEN.sub(rf"\g<prefix>{MASK}", text)
    text = _BEARER.sub(rf"\g<before>{MASK}", text)
    text = _NAMED.sub(_mask_value, text)
    return _HEX.sub(MASK, text)


def masked_command(words: Iterable[str]) -> str:
    """A command line as a shell would read it, with its secrets masked."""
    masked: list[str] = []
    is_value = False
    for word in words:
        name = word.lstrip("-")
        masked.append(MASK if is_value else mask_secrets(word))
        is_value = word.startswith("-") and is_secret_name(name)
    return shlex.join(masked)


def masked_values(value: Any, name: str = "") -> Any:
    """A tree of dictionaries and lists, such as a config, with its secrets masked.

    Args:
        value: The tree; it is not changed.
        name: The key of the value.
    """
    if isinstance(value, Mapping):
        return {key: masked_values(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(entry, name) for entry in value]
    if not isinstance(value, str):
        return value
    if name == "on_event" and re.match(r"\s*https?://", value, re.IGNORECASE):
        return mask_address(value)
    is_secret = is_secret_name(name) and value.lower() not in _PLAIN
    return MASK if is_secret else mask_secrets(value)


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret.

    >>> [is_secret_name(name) for name in ("WANDB_API_KEY", "HF_TOKEN", "tokenizer", "max_tokens")]
    [True, True, False, False]
    """
    return _SECRET_NAME.fullmatch(name) is not None


def _mask_value(match: re.Match[str]) -> str:
    value = match["value"]
    is_message = match["before"].endswith(": ") and value in _MESSAGE_WORDS and not match["quote"]
    is_plain = is_message or value.lower() in _PLAIN or value.endswith(MASK)
    shown = value if is_plain else MASK
    return f"{match['before']}{match['quote']}{shown}"
