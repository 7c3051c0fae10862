"""Metrics for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cpucache.engine import Engine, Metrics

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServerMetrics:
    """Counters and gauges of a server and its store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "cpucache_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.waiting = Gauge("cpucache_requests_waiting", "Requests that wait for their turn.", registry=registry)
        self.running = Gauge("cpucache_requests_running", "Requests that are being answered.", registry=registry)
        self.ttft = Histogram("cpucache_ttft_seconds", "Time to first token.", buckets=_SECONDS, registry=registry)
        self.tpot = Histogram("cpucache_tpot_seconds", "Time per output token.", buckets=_SECONDS, registry=registry)
        self.tokens = Counter(
            "cpucache_prompt_tokens", "Prompt tokens by where their state came from.", ["state"], registry=registry
        )
        self.answered = Counter("cpucache_completion_tokens", "Tokens of answers.", registry=registry)
        self._bytes = Gauge("cpucache_store_bytes", "Bytes of slices by tier.", ["tier"], registry=registry)
        self._evicted = Gauge(
            "cpucache_store_evicted", "Slices evicted from disk since the store was created.", registry=registry
        )

    def note(self, metrics: Metrics) -> None:
        """Counts an answer that has ended."""
        if metrics.ttft_ms:
            self.ttft.observe(metrics.ttft_ms / 1000)
        if metrics.completion_tokens > 1:
            self.tpot.observe(metrics.tpot_ms / 1000)
        for state in ("exact", "clean", "related", "foreign"):
            self.tokens.labels(state).inc(getattr(metrics, f"{state}_tokens"))
        self.tokens.labels("evaluated").inc(metrics.fresh_tokens)
        self.answered.inc(metrics.completion_tokens)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        account = self._engine.store.account()
        self._bytes.labels("ram").set(account.ram_bytes)
        self._bytes.labels("disk").set(account.bytes)
        self._evicted.set(account.evicted)
        return generate_latest(self.registry)
