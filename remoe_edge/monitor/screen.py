"""A frame as a person sees it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from remoe_edge.monitor.frame import ArmState, Frame
from remoe_edge.sizes import format_size

_BARS = "▁▂▃▄▅▆▇█"
_UNKNOWN = "·"
_BAR_WIDTH = 24


def render(frame: Frame, history: Sequence[float] = (), problem: str | None = None) -> RenderableType:
    """All of a frame; `history` holds tokens per second of the frames before it, `problem` why it is not new."""
    parts: list[RenderableType] = []
    if problem:
        parts.append(Text(problem, style="bold red"))
    parts.append(_facts(frame, history))
    if frame.layer_hit_rate:
        parts.append(_heat(frame.layer_hit_rate))
    if frame.arms:
        parts.append(_arms(frame.arms))
    return Panel(Group(*parts), title=Text(f"{frame.source}: {frame.state}"), title_align="left")


def _facts(frame: Frame, history: Sequence[float]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    speed = Text(_join((_number(frame.tokens_per_s, ".1f", " tokens/s"), _number(frame.tpot_ms, ".1f", " ms TPOT"))))
    speed.append("  " + _number(frame.ttft_ms, ".0f", " ms TTFT"))
    if history:
        speed.append("  " + sparkline(history), style="cyan")
    table.add_row("speed", speed)
    table.add_row("hits", _number(frame.hit_rate, ".1%"))
    reads = _rate(frame.read_bytes_per_s)
    if frame.storage_bytes_per_s:
        reads += f" of {_rate(frame.storage_bytes_per_s)} that the storage can do"
    if frame.prefetch_bytes_per_s:
        reads += f", {_rate(frame.prefetch_bytes_per_s)} read ahead"
    table.add_row("storage", f"{reads}, {_number(frame.stall_share, '.1%')} of the time stalled")
    table.add_row("cache", _memory(frame))
    if frame.memory_bytes is not None:
        table.add_row("memory", f"{format_size(frame.memory_bytes)} at its peak")
    table.add_row(
        "power",
        _join((_number(frame.power_w, ".1f", " W"), _number(frame.temperature_c, ".0f", " °C")), "not measured"),
    )
    return table


def _memory(frame: Frame) -> Text:
    if frame.budget_bytes is None:
        return Text("no expert cache")
    used = frame.used_bytes or 0
    filled = round(min(1.0, used / frame.budget_bytes) * _BAR_WIDTH) if frame.budget_bytes else 0
    text = Text("█" * filled, style="green").append("░" * (_BAR_WIDTH - filled), style="dim")
    return text.append(f" {format_size(used)} of {format_size(frame.budget_bytes)}", style="default")


def _heat(rates: Sequence[float | None]) -> Text:
    """A bar per layer: its height and colour are its hit rate."""
    text = Text("hits by layer  ", style="bold")
    for rate in rates:
        if rate is None:
            text.append(_UNKNOWN, style="dim")
        else:
            text.append(_bar(rate), style=f"rgb({round(220 * (1 - rate))},{round(200 * rate)},60)")
    known = [rate for rate in rates if rate is not None]
    if known:
        lowest = min(range(len(rates)), key=lambda index: 2.0 if rates[index] is None else rates[index] or 0.0)
        text.append(f"  lowest {min(known):.0%} in layer {lowest}", style="dim")
    return text


def _arms(arms: Sequence[ArmState]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("arm", overflow="fold")
    for name in ("runs", "TPOT ms", "hits", "MB/token"):
        table.add_column(name, justify="right")
    table.add_column("")
    for arm in arms:
        read = arm.bytes_per_token
        table.add_row(
            Text(arm.label),
            str(arm.runs),
            _number(arm.tpot_ms, ".1f"),
            _number(arm.hit_rate, ".1%"),
            _number(None if read is None else read / 1e6, ".1f"),
            "" if arm.status == "ok" else arm.status,
        )
    return table


def sparkline(values: Sequence[float]) -> str:
    """One character per value, the highest of them a full block."""
    top = max(values, default=0.0)
    return "".join(_bar(value / top if top > 0 else 0.0) for value in values)


def _bar(part: float) -> str:
    return _BARS[min(len(_BARS) - 1, max(0, int(part * len(_BARS))))]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f} MB/s"


def _join(parts: Sequence[str], nothing: str = "-") -> str:
    return "  ".join(part for part in parts if part != "-") or nothing
