"""The receiver of events: a command or an address, and one line for anything else."""

import pytest

from megatron_chameleon.config.checks.on_event import check_on_event
from megatron_chameleon.config.schema import LoggingConfig


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("ftp://host/x", "ftp is neither http nor https"),
        ("file:///etc/passwd", "file is neither http nor https"),
        ("https://", "'https://' has no host, or has blanks or letters outside ASCII"),
        ("https:///x", "'https:///***' has no host, or has blanks or letters outside ASCII"),
        ("http://host:0/x", "'http://host:0/***' has no host, or has blanks or letters outside"),
        ("http://host:99999/secret", "the address cannot be read (Port out of range 0-65535)"),
        ("http://[::1/secret", "the address cannot be read (Invalid IPv6 URL)"),
        (
            "https://host/a secret",
            "'https://host/***' has no host, or has blanks or letters outside",
        ),
        (
            "https://h\u00f6st/secret",
            "'https://h\u00f6st/***' has no host, or has blanks or letters",
        ),
        ("", "'' does not name a program"),
        ("  ", "'  ' does not name a program"),
        ("''", "\"''\" does not name a program"),
        ("notify 'it", '"notify \'it" cannot be split into words (No closing quotation)'),
        ("notify --api-key x'", '"notify --api-key ***\'" cannot be split into words'),
    ],
)
def test_what_is_no_receiver(target: str, what: str) -> None:
    (problem,) = check_on_event(LoggingConfig(on_event=target))
    assert problem.where == "logging.on_event" and problem.what.startswith(what)
    assert "secret" not in problem.what


@pytest.mark.parametrize(
    "target",
    [
        None,
        "notify.sh",
        "python 'my program.py' --to me@host",
        "/nowhere/notify",
        "https://host",
        "https://host/***",  # of a run folder: `data audit RUN` and others read it
        "HTTPS://host:8443/x?y=z",
        "http://me:pw@[::1]:80/x",
    ],
)
def test_what_is_one(target: str | None) -> None:
    assert list(check_on_event(LoggingConfig(on_event=target))) == []
