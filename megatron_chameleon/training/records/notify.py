"""Tell a command or a webhook of an event, as ``logging.on_event`` says, beside the run.

Each delivery has a thread, a time limit, and nothing that the run waits for. A failure is one
warning. There are at most ``MOST_IN_FLIGHT`` deliveries at a time, so that neither a dead server
nor a run with an alarm in every step piles up threads; what comes meanwhile is left out, and said.
"""

import logging
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_chameleon.config.checks.on_event import is_masked, is_url
from megatron_chameleon.config.schema import LoggingConfig
from megatron_chameleon.errors import one_line
from megatron_chameleon.masking import mask_address, mask_secrets
from megatron_chameleon.training.records.delivery import (
    Cancelled,
    DeliveryError,
    post_json,
    run_program,
)

logger = logging.getLogger(__name__)

KEY = "logging.on_event"
LIMIT_SECONDS = 30.0
"""How long one delivery may take."""
WAIT_SECONDS = 5.0
"""How long the end of a run waits for deliveries."""
MOST_IN_FLIGHT = 4


class Notifier:
    """Sends events, each in a thread of its own.

    Args:
        config: ``on_event`` and ``on_event_kinds`` are read.
        folder: The run's, which the receiver is told.
        limit_seconds: How long one delivery may take.
    """

    def __init__(
        self, config: LoggingConfig, folder: Path, limit_seconds: float = LIMIT_SECONDS
    ) -> None:
        target = (config.on_event or "").strip()
        self._target = "" if is_masked(target) else target
        self._kinds = set(config.on_event_kinds)
        self._folder = folder
        self._limit = limit_seconds
        self._in_flight: list[_Delivery] = []
        self._left_out = 0

    def send(self, event: Mapping[str, Any]) -> None:
        """Begin to send an event, if it is of a kind that is wanted. It never raises, nor waits."""
        if not self._target or event.get("event") not in self._kinds:
            return
        self._in_flight = [delivery for delivery in self._in_flight if delivery.is_alive()]
        if len(self._in_flight) >= MOST_IN_FLIGHT:
            self._left_out += 1
            if self._left_out == 1:
                logger.warning(
                    f"{KEY}: {MOST_IN_FLIGHT} deliveries are still under way, so events such as "
                    f"this {event['event']} are left out until one ends"
                )
            return
        self._left_out = 0
        delivery = _Delivery(self._target, {**event, "run": str(self._folder.absolute())})
        try:
            delivery.start(self._limit)
        except RuntimeError as error:  # no thread can be started
            logger.warning(f"{KEY}: the {event['event']} was not sent: {one_line(error)}")
            return
        self._in_flight.append(delivery)

    def close(self, wait_seconds: float = WAIT_SECONDS) -> None:
        """Wait a little for what is under way, then end it and say so."""
        deadline = time.monotonic() + wait_seconds
        late = [one for one in self._in_flight if not one.has_ended(deadline - time.monotonic())]
        for delivery in late:
            delivery.cancel()
        if late:
            kinds = ", ".join(delivery.kind for delivery in late)
            logger.warning(
                f"{KEY}: the run ends, and after {wait_seconds:g} s this is not sent: {kinds}"
            )
        self._in_flight = []


class _Delivery:
    """One event on its way."""

    def __init__(self, target: str, event: Mapping[str, Any]) -> None:
        self._target, self._event = target, event
        self._cancelled = threading.Event()
        self.kind = str(event["event"])

    def start(self, limit_seconds: float) -> None:
        # A daemon, so that a server that answers a byte a minute does not keep the process.
        name = f"on-event-{self.kind}"
        self._thread = threading.Thread(
            target=self._run, args=(limit_seconds,), name=name, daemon=True
        )
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def has_ended(self, wait_seconds: float) -> bool:
        self._thread.join(max(0.0, wait_seconds))
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """End the program, and say nothing of it any more."""
        self._cancelled.set()
        self.has_ended(0.5)  # the time to end it

    def _run(self, limit_seconds: float) -> None:
        try:
            _send(self._target, self._event, limit_seconds, self._cancelled)
        except Cancelled:
            return
        except DeliveryError as error:
            what = str(error)
        except Exception as error:  # whatever it is, it must not harm the run
            what = one_line(error)
        else:
            return
        if not self._cancelled.is_set():
            logger.warning(f"{KEY}: {mask_secrets(f'the {self.kind} was not sent: {what}')}")


def _send(
    target: str, event: Mapping[str, Any], limit_seconds: float, cancelled: threading.Event
) -> None:
    deliver: Callable[..., None] = post_json if is_url(target) else run_program
    deliver(target, event, limit_seconds, cancelled)


def receiver_warning(config: LoggingConfig) -> str | None:
    """What to say before a run whose events cannot be sent from this machine; None if they can.

    It is no error: a run must not depend on a program that tells of it.
    """
    target = (config.on_event or "").strip()
    if is_masked(target):
        return (
            f"{KEY}: the secret of {mask_address(target)} is masked, as in the config.yaml of a "
            "run folder, so events are only recorded in events.jsonl; give the address again"
        )
    if not target or is_url(target):
        return None
    program = shlex.split(target)[0]
    if shutil.which(program) is not None:
        return None
    return (
        f"{KEY}: this machine has no program {program!r} that can be run, so events are only "
        "recorded in events.jsonl"
    )
