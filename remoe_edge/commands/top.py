"""`remoe-edge top`: watch a running server or benchmark."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live

from remoe_edge.errors import RemoeError
from remoe_edge.monitor.benchmark import benchmark_frame, is_benchmark
from remoe_edge.monitor.frame import Frame
from remoe_edge.monitor.screen import render
from remoe_edge.monitor.server import DEFAULT_URL, metrics_url, scrape, server_frame, watch

_WINDOW_S = 10.0
_HISTORY = 40
_WIDTH = 120


@click.command("top")
@click.argument("target", metavar="[URL|FILE]", default=DEFAULT_URL)
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one frame as a JSON object and end.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Time between two looks.",
)
@click.option("--api-key", metavar="KEY", envvar="LLAMA_API_KEY", help="Of the server. [default: $LLAMA_API_KEY]")
def command(target: str, once: bool, as_json: bool, interval: float, api_key: str | None) -> None:
    """Watch a server of `remoe-edge serve`, or the benchmark that writes FILE, until Ctrl-C.

    \b
    remoe-edge top
    remoe-edge top http://jetson:8080 --interval 2
    remoe-edge top results.jsonl --once

    Shows speed, hits by layer, reads from storage, the cache against its budget, power and temperature. URL is
    http://127.0.0.1:8080 by default. Rates are those of the last 10 seconds; with --once or --json, of one interval.
    """
    look = _benchmark(target) if is_benchmark(target) else _server(target, api_key)
    frame = look()
    if once or as_json:
        if not frame.arms:
            # A rate takes two looks.
            time.sleep(interval)
            frame = look()
        if as_json:
            click.echo(json.dumps(asdict(frame)))
        else:
            console = Console()
            (console if console.is_terminal else Console(width=_WIDTH)).print(render(frame))
        return
    with suppress(KeyboardInterrupt):
        _live(look, frame, interval)


def _live(look: Callable[[], Frame], frame: Frame, interval: float) -> None:
    speeds: deque[float] = deque(maxlen=_HISTORY)
    problem = None
    with Live(console=Console(), auto_refresh=False, screen=Console().is_terminal) as live:
        while True:
            if problem is None:
                speeds.append(frame.tokens_per_s or 0.0)
            live.update(render(frame, speeds, problem), refresh=True)
            time.sleep(interval)
            try:
                frame, problem = look(), None
            except RemoeError as error:
                # It may come back; until then the last that was seen stays, and says so.
                problem = str(error)


def _server(target: str, api_key: str | None) -> Callable[[], Frame]:
    url = metrics_url(target)
    more = watch(lambda: scrape(url, api_key), _WINDOW_S)
    return lambda: server_frame(more(), url.removesuffix("/metrics"))


def _benchmark(target: str) -> Callable[[], Frame]:
    return lambda: benchmark_frame(Path(target))
