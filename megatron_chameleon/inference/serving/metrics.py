"""Prometheus metrics of the server."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from megatron_chameleon.inference.engine.interface import TokenEngine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters and histograms of one server, and gauges of its engine."""

    def __init__(self, engine: TokenEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineGauges(engine))
        self.requests = self._counter("requests", "Responses", "path", "status")
        self.cancelled = self._counter("cancelled", "Answers ended before their end", "reason")
        self.tokens = self._counter("generated_tokens", "Tokens drawn, by modality", "modality")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.images = self._counter("images", "Images read (in) and drawn (out)", "direction")
        self.queue = self._histogram(
            "queue_seconds", "From the engine's getting a request to its first token", _SECONDS
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", _SECONDS
        )
        self.per_token = self._histogram(
            "time_per_token_seconds", "Mean time between the tokens of an answer", _TOKEN_SECONDS
        )
        self.duration = self._histogram(
            "request_seconds", "From a request's arrival to the end of its response", _SECONDS
        )

    def text(self) -> bytes:
        """What ``/metrics`` answers."""
        return generate_latest(self._registry)

    def _counter(self, name: str, summary: str, *labels: str) -> Counter:
        return Counter(f"chameleon_{name}", summary, labels, registry=self._registry)

    def _histogram(self, name: str, summary: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"chameleon_{name}", summary, buckets=buckets, registry=self._registry)


class _EngineGauges:
    """Asks the engine when the metrics are read."""

    def __init__(self, engine: TokenEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        usage = self._engine.usage()
        for name, summary, value in (
            ("running", "Answers that grow now", usage.running),
            ("waiting", "Answers that wait for room", usage.waiting),
            ("cache_tokens_used", "Tokens whose keys and values are held", usage.cache_tokens_used),
            ("cache_tokens", "Tokens whose keys and values fit", usage.cache_tokens_total),
        ):
            yield GaugeMetricFamily(f"chameleon_{name}", summary, value)
