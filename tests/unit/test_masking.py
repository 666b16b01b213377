"""Secrets are masked wherever a text is kept or shown, and nothing else is."""

import time

import pytest

from megatron_chameleon.masking import (
    is_secret_name,
    mask_address,
    mask_secrets,
    masked_command,
    masked_values,
)

SECRETS = {
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345": "hf_***",
    "sk-abcdefghijklmnopqrst": "sk-***",
    "sk-proj-ab_cd-ef0123456789": "sk-proj-***",
    "ghp_0123456789abcdefghij0123456789abcdef": "ghp_***",
    "github_pat_11ABCDEFG0_abcdefghij": "github_pat_***",
    "AKIAIOSFODNN7EXAMPLE": "AKIA***",
    "wandb login 0123456789abcdef0123456789abcdef01234567": "wandb login ***",
    "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM": "eyJ***",
    "--api-key X1": "--api-key ***",
    "--api-key=X1": "--api-key=***",
    "--hub-token abc": "--hub-token ***",
    "WANDB_API_KEY=12 x": "WANDB_API_KEY=*** x",
    "{'password': 'abc', 'b': 1}": "{'password': '***', 'b': 1}",
    "AWS_SECRET_ACCESS_KEY=a/b+c": "AWS_SECRET_ACCESS_KEY=***",
    "Authorization: Bearer abcdefghijklmn": "Authorization: Bearer ***",
    "https://me:pw@host/x.jsonl:3": "https://***@host/x.jsonl:3",
    "s3://key:se:cret@bucket/x": "s3://***@bucket/x",
    "logging.on_event=https://h:1/a/b?c=d": "logging.on_event=https://h:1/***",
    "https://hooks.slack.com/services/T0/B0/x": "https://hooks.slack.com/services/***",
    "curl -d @- https://discord.com/api/webhooks/1/x": "curl -d @- https://discord.com/api/webhooks/***",
    "https://api.telegram.org/bot1:x/sendMessage": "https://api.telegram.org/bot***",
    "https://h/x?X-Amz-Signature=abc&a=1": "https://h/x?X-Amz-Signature=***&a=1",
}
PLAIN = (
    "tokenizer.path=runs/hf_tokenizer_2024_big data.tokens=5",
    "eos_token=abcdefghijk bos_token: '<s>' max_tokens: 500",
    "token: 5 tokens per step, token=5",
    "sk-learn-datasets-2024/x.jsonl",
    "/home/a@b/c git@github.com:x/y",
    "sha256 " + "0123456789abcdef" * 4,
    "models--x/snapshots/0123456789abcdef0123456789abcdef01234567/config.json",
    "api_key: null",
    "/etc/passwd: the image cannot be read. WANDB_API_KEY: it is empty",
)


@pytest.mark.parametrize(("text", "masked"), SECRETS.items())
def test_what_looks_like_a_secret(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked
    assert mask_secrets(f"a: '{text}'") == f"a: '{masked}'"
    assert mask_secrets(masked) == masked


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_none(text: str) -> None:
    assert mask_secrets(text) == text


def test_a_command() -> None:
    words = ["train", "x.yaml", "--api-key", "a b", "--token", "c", "x.key=hf_" + "a" * 34, "n=1 2"]
    masked = "train x.yaml --api-key '***' --token '***' 'x.key=hf_***' 'n=1 2'"
    assert masked_command(words) == masked


def test_a_config() -> None:
    config = {"a": [{"wandb_api_key": "x", "token": None}], "path": "s3://a:b@c", "n": 3}
    expected = {"a": [{"wandb_api_key": "***", "token": None}], "path": "s3://***@c", "n": 3}
    assert masked_values(config) == expected
    assert config["path"] == "s3://a:b@c"


@pytest.mark.parametrize(
    ("address", "masked"),
    [
        ("https://host/services/T0/secret", "https://host/***"),
        ("http://me:pw@host:81/x", "http://host:81/***"),
        ("http://me:pw@host", "http://host/***"),
        ("https://host?key=1", "https://host/***"),
        ("https://host#x", "https://host/***"),
        (" https://host/x@elsewhere/y", "https://host/***"),
        ("https://host", "https://host"),
    ],
)
def test_an_address(address: str, masked: str) -> None:
    assert mask_address(address) == masked
    assert masked_values({"on_event": address}) == {"on_event": masked}
    assert mask_address(masked) == masked


def test_names() -> None:
    assert all(
        map(is_secret_name, ("HF_TOKEN", "MY_DB_PASSWORD", "wandb.api-key", "AWS_SECRET_KEY"))
    )
    assert not any(map(is_secret_name, ("tokenizer", "max_tokens", "eos_token", "SLURM_JOB_ID")))


@pytest.mark.parametrize(
    "part",
    [
        "a_",
        "://",
        "sk-",
        "eyJaaaaaaaa.",
        "secret",
        " -a",
        "token=",
        "Bearer ",
        "api_key ",
        "on_event=https://a/",
        "https://hooks.slack.com/services/",
        "on_event ",
    ],
)
def test_a_long_text_takes_linear_time(part: str) -> None:
    start = time.perf_counter()
    mask_secrets(part * 30_000)
    assert time.perf_counter() - start < 2
