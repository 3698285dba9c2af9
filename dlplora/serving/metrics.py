"""What the server counts, as Prometheus reads it."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from dlplora.engine.answers import Answer

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_CONFIDENCE = tuple(step / 10 for step in range(1, 11))


class Metrics:
    """Counters of one server; `running` and `waiting` tell what is in the engine."""

    def __init__(self, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = own = CollectorRegistry()
        gauge = Gauge("dlplora_requests_running", "Answers that are written", registry=own)
        gauge.set_function(running)
        gauge = Gauge("dlplora_requests_waiting", "Requests that wait for a place", registry=own)
        gauge.set_function(waiting)
        self._prompt_tokens = Counter("dlplora_prompt_tokens", "Tokens of prompts", registry=own)
        self._tokens = Counter("dlplora_generated_tokens", "Tokens of answers", registry=own)
        self._finished = Counter(
            "dlplora_requests_finished", "Answers by how they ended", ["reason"], registry=own
        )
        self._first = Histogram(
            "dlplora_time_to_first_token_seconds",
            "From a request to its first text",
            buckets=_SECONDS,
            registry=own,
        )
        self._between = Histogram(
            "dlplora_time_between_tokens_seconds",
            "Mean time between the tokens of an answer",
            buckets=_BETWEEN,
            registry=own,
        )
        self._adapter_requests = Counter(
            "dlplora_adapter_requests", "Answers by adapter", ["adapter"], registry=own
        )
        self._adapter_tokens = Counter(
            "dlplora_adapter_tokens", "Tokens of answers by adapter", ["adapter"], registry=own
        )
        self._fallbacks = Counter(
            "dlplora_fallbacks", "Routes to the base model, the router unsure", registry=own
        )
        self._confidence = Histogram(
            "dlplora_confidence",
            "Confidence of routes by adapter",
            ["adapter"],
            buckets=_CONFIDENCE,
            registry=own,
        )

    def began(self, seconds: float) -> None:
        """Count the first text of an answer, so many seconds after the request."""
        self._first.observe(seconds)

    def ended(self, answer: Answer, *, seconds: float, counts_prompt: bool) -> None:
        """Count an answer that took so many seconds from its first text to its last."""
        self._finished.labels(answer.ending).inc()
        self._tokens.inc(answer.num_tokens)
        if counts_prompt:
            self._prompt_tokens.inc(answer.num_prompt_tokens)
        if answer.num_tokens > 1:
            self._between.observe(seconds / (answer.num_tokens - 1))
        names = {name for part in answer.parts for name in part.route.adapters} or {"base"}
        for name in names:
            self._adapter_requests.labels(name).inc()
            self._adapter_tokens.labels(name).inc(answer.num_tokens)
        for route in (part.route for part in answer.parts):
            if route.confidence is not None:
                self._confidence.labels(next(iter(route.adapters), "base")).observe(
                    route.confidence
                )
                if not route.adapters:
                    self._fallbacks.inc()

    def failed(self, reason: str) -> None:
        """Count a request that was not answered to its end."""
        self._finished.labels(reason).inc()

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)
