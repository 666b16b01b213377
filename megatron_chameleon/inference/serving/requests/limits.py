"""What one client may ask for, and what the server holds at a time."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Each is an option of ``chameleon serve``."""

    body_bytes: int = 32 * MIB
    """Of one request."""
    bodies_bytes: int = 256 * MIB
    """Of all requests that arrive at the same time."""
    images: int = 16
    """In one request."""
    image_bytes: int = 20 * MIB
    """Of one image's file."""
    image_pixels: int = 1 << 25
    """Of one image."""
    messages: int = 1024
    prompt_tokens: int | None = None
    """None is as many as fit in the context."""
    max_tokens: int | None = None
    """Of one answer. None is as many as fit in the context."""
    answers: int = 16
    """Of one request: prompts times ``n``."""
    queue: int = 256
    """Answers that wait for their first token."""
    queue_seconds: float = 120.0
    """Until the first token."""
    request_seconds: float = 900.0
    """From a request's arrival to the end of its answer."""
    connections: int = 512
    header_seconds: float = 15.0
    """Until the headers of a request have arrived."""
    body_seconds: float = 60.0
    """Until the body of a request has arrived."""
    stalled_seconds: float = 30.0
    """How long a client may leave what was sent unread."""
    idle_seconds: int = 30
    """How long a connection without a request is kept."""
    ping_seconds: float = 10.0
    """How often a stream without news gets a comment, so that proxies keep it."""
    grace_seconds: float = 30.0
    """How long running answers may take after SIGTERM."""
    header_bytes: int = 32 << 10
