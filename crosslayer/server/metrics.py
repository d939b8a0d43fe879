"""What /metrics shows, for Prometheus: the engine's state when asked, and what was counted and timed on the way."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from crosslayer.engine import Engine
from crosslayer.plan.cost import kv_bytes

# Seconds: from a small model on a GPU to a long queue in front of a CPU.
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """The figures of one server, in a registry of their own. Counted by the event loop."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.finished = Counter(
            "crosslayer_finished",
            "Samples that have ended, by reason.",
            ["reason"],
            registry=registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self.finished.labels(reason)  # shown from the start, as 0
        self.refused = Counter("crosslayer_refused", "Requests refused because the queue was full.", registry=registry)
        self.prompt_tokens = Counter("crosslayer_prompt_tokens", "Tokens of prompts accepted.", registry=registry)
        self.generated_tokens = Counter("crosslayer_generated_tokens", "Tokens generated.", registry=registry)
        self.first_token = Histogram(
            "crosslayer_time_to_first_token_seconds",
            "From when a request was accepted to the first token of each sample.",
            buckets=_FIRST,
            registry=registry,
        )
        self.inter_token = Histogram(
            "crosslayer_inter_token_seconds", "Between two tokens of a sample.", buckets=_BETWEEN, registry=registry
        )
        registry.register(_EngineState(engine))

    def token(self, now: float, started: float, last: float | None) -> None:
        """A sample has a new token: its first, or one after that at `last`."""
        self.generated_tokens.inc()
        if last is None:
            self.first_token.observe(now - started)
        else:
            self.inter_token.observe(now - last)


class _EngineState(Collector):
    """Read from the engine while its thread goes on: each figure is one whole number, true a moment ago."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        config, length = engine.runner.config, engine.max_length
        unshared = config.with_plan(config.plan.unshared)
        self._unshared_ratio = kv_bytes(unshared, length) / kv_bytes(config, length)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        engine, scheduler, pools = self._engine, self._engine.scheduler, self._engine.blocks.pools
        yield GaugeMetricFamily("crosslayer_running", "Samples in the cache.", len(scheduler.running))
        yield GaugeMetricFamily("crosslayer_waiting", "Samples that wait for a place.", len(scheduler.waiting))
        used = GaugeMetricFamily("crosslayer_cache_blocks_used", "Blocks that samples hold, by span.", labels=["span"])
        total = GaugeMetricFamily("crosslayer_cache_blocks", "Blocks in the cache, by span.", labels=["span"])
        for span, pool in pools.items():
            used.add_metric([str(span)], pool.size - pool.num_free)
            total.add_metric([str(span)], pool.size)
        yield used
        yield total
        yield GaugeMetricFamily("crosslayer_cache_used_bytes", "Bytes of blocks held.", engine.cache_bytes_used)
        yield GaugeMetricFamily("crosslayer_cache_bytes", "Bytes of the cache.", engine.runner.cache.nbytes)
        yield GaugeMetricFamily(
            "crosslayer_unshared_cache_ratio",
            "Cache of the same model without sharing, over this one's, for a sequence of the longest length.",
            self._unshared_ratio,
        )
        yield CounterMetricFamily(
            "crosslayer_prefix_tokens", "Tokens found in the cache instead of computed.", scheduler.num_prefix_tokens
        )
        yield CounterMetricFamily(
            "crosslayer_preemptions", "Samples that had to give their blocks back.", scheduler.num_preemptions
        )
