"""The origin of pages in tests."""

from datetime import UTC, datetime

from megatron_chameleon.pages.page import Origin

ORIGIN = Origin("chameleon VERB --html page.html", datetime(2026, 1, 2, 3, 4, tzinfo=UTC))
