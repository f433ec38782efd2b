"""What an engine has done, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from jpeft.serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class EngineCollector:
    """Reads an engine's counts when Prometheus asks.

    >>> registry = CollectorRegistry()
    >>> registry.register(EngineCollector(engine))  # doctest: +SKIP
    """

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        """The metrics."""
        engine, stats = self.engine, self.engine.stats
        counts = {
            "jpeft_requests_submitted": ("Requests that were taken.", stats.submitted),
            "jpeft_requests_refused": ("Requests that found the queue full.", stats.refused),
            "jpeft_prompt_tokens": ("Tokens of prompts that were read.", stats.prompt_tokens),
            "jpeft_generated_tokens": ("Tokens that were generated.", stats.new_tokens),
            "jpeft_decode_steps": ("Calls of the decoding program.", stats.steps),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(name, text, value=value)
        finished = CounterMetricFamily("jpeft_requests_finished", "Requests that ended.", labels=["reason"])
        for reason, count in dict(stats.finished).items():
            finished.add_metric([reason], count)
        yield finished
        gauges = {
            "jpeft_queue_length": ("Requests that wait for a row.", engine.queued),
            "jpeft_running": ("Requests in rows.", engine.running),
            "jpeft_rows": ("Rows.", engine.rows),
            "jpeft_adapters": ("Adapters in the bank.", 0 if engine.bank is None else len(engine.bank.names)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)


def render(engine: Engine) -> bytes:
    """The text that Prometheus reads.

    >>> render(engine)[:7]  # doctest: +SKIP
    b'# HELP '
    """
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))  # type: ignore[arg-type]
    return generate_latest(registry)
