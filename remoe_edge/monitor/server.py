"""A running server, seen through its metrics in Prometheus' text format.

llama.cpp's own names, and those of `remoe-edge serve`: ``remoe_expert_cache_*`` (counters with a label ``layer``),
``remoe_ttft_seconds``, ``remoe_tpot_seconds`` (histograms), ``remoe_power_watts``, ``remoe_temperature_celsius``.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

from remoe_edge.errors import RemoeError
from remoe_edge.monitor.frame import Frame

DEFAULT_URL = "http://127.0.0.1:8080"

_TIMEOUT_S = 5.0
_MOST_BYTES = 16 << 20
_CACHE = "remoe_expert_cache_"


@dataclass(frozen=True)
class Scrape:
    """All metrics at one moment: by name, values by the label `layer`, or "" without one. Others are added up."""

    time_s: float
    values: dict[str, dict[str, float]]

    def total(self, name: str) -> float | None:
        """The sum over layers; None if the server has no such metric."""
        found = self.values.get(name)
        if found is None:
            return None
        layers = [value for layer, value in found.items() if layer]
        return sum(layers) if layers else found[""]


def metrics_url(address: str) -> str:
    """Where the metrics of a server are, from "host:8080" or a URL. Raises RemoeError if it is neither."""
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RemoeError(f"{address!r} is no address of a server; write for example {DEFAULT_URL}")
    return url if parts.path.endswith("/metrics") else f"{url.rstrip('/')}/metrics"


def scrape(url: str, api_key: str | None = None) -> Scrape:
    """Read a server's metrics. Raises RemoeError that says what to do if there is no server, or it does not tell."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urlopen(Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
            text = response.read(_MOST_BYTES).decode(errors="replace")
    except HTTPError as error:
        with error:
            what = {
                401: "wants a key; give it with --api-key or as LLAMA_API_KEY",
                403: "refuses the key; give another one with --api-key or as LLAMA_API_KEY",
                404: "has no metrics there; is it a server of `remoe-edge serve` or llama-server --metrics?",
                501: "does not show metrics; start it with `remoe-edge serve MODEL`, or llama-server with --metrics",
                503: "is not ready yet: it is loading its model",
            }.get(error.code, f"answers with status {error.code}")
        raise RemoeError(f"{url}: the server {what}") from error
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise RemoeError(
            f"{url}: no server answers ({reason}); start one with `remoe-edge serve MODEL`, or give the address of "
            "another: `remoe-edge top http://HOST:PORT`"
        ) from error
    return parse(text, time.monotonic(), url)


def parse(text: str, time_s: float, source: str) -> Scrape:
    """Metrics from Prometheus' text format. Raises RemoeError if it is something else."""
    values: dict[str, dict[str, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                layer = sample.labels.get("layer", "")
                by_layer = values.setdefault(sample.name, {})
                if family.type == "gauge" and layer in by_layer:
                    # Of several temperatures the highest; of several rails there is one total.
                    by_layer[layer] = max(by_layer[layer], sample.value)
                else:
                    by_layer[layer] = by_layer.get(layer, 0.0) + sample.value
    except ValueError as error:
        raise RemoeError(f"{source}: does not answer in Prometheus' text format: {error}") from error
    if not values:
        raise RemoeError(f"{source}: answers without any metrics; is it a server of `remoe-edge serve`?")
    return Scrape(time_s, values)


def server_frame(scrapes: Sequence[Scrape], source: str) -> Frame:
    """What a server did between the first and the last of these scrapes, which are of the last seconds."""
    first, last = scrapes[0], scrapes[-1]
    seconds = last.time_s - first.time_s

    def risen(name: str) -> float | None:
        """How much a counter rose; None if it is not there, or the server began again meanwhile."""
        before, after = first.total(name), last.total(name)
        return after - before if before is not None and after is not None and after >= before else None

    def rate(name: str) -> float | None:
        rise = risen(name)
        return rise / seconds if rise is not None and seconds > 0 else None

    def whole(name: str) -> int | None:
        value = last.total(name)
        return int(value) if value is not None and math.isfinite(value) else None

    def mean_ms(name: str) -> float | None:
        """Mean of a histogram in the last seconds; if it was not used then, since the start."""
        sums, counts = f"{name}_sum", f"{name}_count"
        for total, number in (
            (risen(sums), risen(counts)),
            (last.total(sums), last.total(counts)),
        ):
            if total is not None and number:
                return total / number * 1e3
        return None

    seconds_predicting, predicted = (
        risen("llamacpp:tokens_predicted_seconds_total"),
        risen("llamacpp:tokens_predicted_total"),
    )
    tpot = mean_ms("remoe_tpot_seconds")
    if tpot is None and predicted and seconds_predicting:
        tpot = seconds_predicting / predicted * 1e3
    demand, ahead = rate(f"{_CACHE}bytes_demand_total"), rate(f"{_CACHE}bytes_prefetch_total")
    hit_rates = _hit_rates(first, last)
    requests = last.total("llamacpp:requests_processing")
    return Frame(
        source=source,
        state=_state(requests, last.total("llamacpp:requests_deferred"))
        + (", cannot read its experts" if last.total(f"{_CACHE}storage_failing") else ""),
        tpot_ms=tpot,
        ttft_ms=mean_ms("remoe_ttft_seconds"),
        # llama.cpp counts the tokens of an answer when it ends; until then it tells its mean speed.
        tokens_per_s=rate("llamacpp:tokens_predicted_total")
        or (last.total("llamacpp:predicted_tokens_seconds") if requests else 0.0),
        hit_rate=hit_rates.pop("", None),
        layer_hit_rate=tuple(hit_rates[layer] for layer in sorted(hit_rates, key=_number)),
        read_bytes_per_s=demand + (ahead or 0.0) if demand is not None else None,
        prefetch_bytes_per_s=ahead,
        stall_share=rate(f"{_CACHE}stall_seconds_total"),
        evictions_per_s=rate(f"{_CACHE}evictions_total"),
        budget_bytes=whole(f"{_CACHE}budget_bytes"),
        used_bytes=whole(f"{_CACHE}used_bytes"),
        power_w=last.total("remoe_power_watts"),
        temperature_c=last.total("remoe_temperature_celsius"),
    )


def _hit_rates(first: Scrape, last: Scrape) -> dict[str, float | None]:
    """Hits of all look-ups by layer and, as "", of all; since the start where there was none in between."""
    hits, misses = f"{_CACHE}hits_total", f"{_CACHE}misses_total"
    if hits not in last.values or misses not in last.values:
        return {}
    counts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def count(since: Scrape | None) -> None:
        for index, name in enumerate((hits, misses)):
            for layer, value in last.values[name].items():
                counts[layer][index] = value - (since.values.get(name, {}).get(layer, 0.0) if since else 0.0)

    count(first)
    numbers = [number for pair in counts.values() for number in pair]
    if sum(numbers) <= 0 or min(numbers) < 0:
        count(None)
    layers = {layer: pair for layer, pair in counts.items() if layer}
    rates = {layer: pair[0] / sum(pair) if sum(pair) > 0 else None for layer, pair in counts.items()}
    if layers:
        total = sum(sum(pair) for pair in layers.values())
        rates[""] = sum(pair[0] for pair in layers.values()) / total if total > 0 else None
    return rates


def _number(layer: str) -> tuple[int, str]:
    return (int(layer), "") if layer.isdigit() else (1 << 31, layer)


def _state(processing: float | None, deferred: float | None) -> str:
    if processing is None:
        return "serving"
    if not processing:
        return "idle"
    waiting = f", {deferred:.0f} waiting" if deferred else ""
    return f"{processing:.0f} request{'' if processing == 1 else 's'}{waiting}"


def watch(read: Callable[[], Scrape], window_s: float) -> Callable[[], list[Scrape]]:
    """A function that reads once more and returns the scrapes of the last `window_s` seconds, two at least."""
    scrapes: list[Scrape] = []

    def more() -> list[Scrape]:
        scrapes.append(read())
        while len(scrapes) > 2 and scrapes[1].time_s < scrapes[-1].time_s - window_s:
            del scrapes[0]
        return scrapes

    return more
