"""What /metrics says, in Prometheus' text format: the names that vLLM's dashboards know, with our prefix."""

from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

PREFIX = "gemma"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


@dataclass(frozen=True)
class Metrics:
    registry: CollectorRegistry
    running: Gauge
    waiting: Gauge
    cache_used: Gauge
    prompt_tokens: Counter
    cached_tokens: Counter
    generation_tokens: Counter
    finished: Counter  # by reason
    put_back: Counter
    first_token_s: Histogram
    between_tokens_s: Histogram
    request_s: Histogram


def new_metrics() -> Metrics:
    disable_created_metrics()  # when each began is of no interest
    registry = CollectorRegistry()

    def name(what: str) -> str:
        return f"{PREFIX}:{what}"

    return Metrics(
        registry,
        Gauge(name("num_requests_running"), "Sequences that have a slot.", registry=registry),
        Gauge(name("num_requests_waiting"), "Sequences that wait for one.", registry=registry),
        Gauge(name("kv_cache_usage_perc"), "Share of the cache's pages that sequences have.", registry=registry),
        Counter(name("prompt_tokens"), "Tokens of prompts.", registry=registry),
        Counter(name("prefix_cache_hits"), "Of them, those that were in the cache.", registry=registry),
        Counter(name("generation_tokens"), "Tokens chosen.", registry=registry),
        Counter(name("request_success"), "Sequences that ended.", ["finished_reason"], registry=registry),
        Counter(name("num_preemptions"), "Sequences put back for want of pages.", registry=registry),
        Histogram(name("time_to_first_token_seconds"), "From a request.", buckets=SECONDS, registry=registry),
        Histogram(name("time_per_output_token_seconds"), "After the first.", buckets=SECONDS, registry=registry),
        Histogram(name("e2e_request_latency_seconds"), "Of a whole request.", buckets=SECONDS, registry=registry),
    )


def text(metrics: Metrics) -> bytes:
    return bytes(generate_latest(metrics.registry))
