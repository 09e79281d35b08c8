"""NVIDIA's tegrastats: a parser of its lines (JetPack 5, 6 and 7), and the module's power from a running one."""

import os
import re
import select
import shutil
import subprocess
from dataclasses import dataclass

from remoe_edge.power.rails import total_rails
from remoe_edge.power.source import PowerSource, SensorError

_RAIL = re.compile(r"\b(VDD\w*|VIN\w*|POM_\w+) (\d+)mW/(\d+)mW")
_TEMPERATURE = re.compile(r"\b(\w+)@(-?[\d.]+)C\b")
_GPU = re.compile(r"\bGR3D_FREQ (\d+)%(?:@\[?(\d+))?")
_MEMORY = re.compile(r"\bRAM (\d+)/(\d+)MB\b")
_CORES = re.compile(r"\bCPU \[([^\]]*)\]")
_CORE = re.compile(r"(\d+)%@(\d+)")
_FIRST_LINE_S = 5.0
_PATIENCE_PERIODS = 20


@dataclass(frozen=True)
class TegraLine:
    """One line of tegrastats. What the line does not say is empty or None.

    Attributes
    ----------
    rails_w
        Watts at this moment by rail; the mean since tegrastats began, which the line has too, is left out.
    temperatures_c
        By zone, names in lower case.
    cores
        (load in percent, MHz) of each CPU core; None for one that is off.
    gpu_percent, gpu_mhz, memory_used_mb, memory_total_mb
        MHz only where tegrastats ran as root.
    """

    rails_w: dict[str, float]
    temperatures_c: dict[str, float]
    cores: list[tuple[int, int] | None]
    gpu_percent: int | None
    gpu_mhz: int | None
    memory_used_mb: int | None
    memory_total_mb: int | None


def parse_line(line: str) -> TegraLine:
    """Read one line; whatever it lacks is empty or None. Never raises."""
    gpu, memory, cores = _GPU.search(line), _MEMORY.search(line), _CORES.search(line)
    return TegraLine(
        rails_w={name: int(now) / 1000 for name, now, _ in _RAIL.findall(line)},
        temperatures_c={
            name.lower(): float(value) for name, value in _TEMPERATURE.findall(line) if value.count(".") <= 1
        },
        cores=[_core(text) for text in cores[1].split(",")] if cores else [],
        gpu_percent=int(gpu[1]) if gpu else None,
        gpu_mhz=int(gpu[2]) if gpu and gpu[2] else None,
        memory_used_mb=int(memory[1]) if memory else None,
        memory_total_mb=int(memory[2]) if memory else None,
    )


def _core(text: str) -> tuple[int, int] | None:
    match = _CORE.fullmatch(text.strip())
    return (int(match[1]), int(match[2])) if match else None


class TegrastatsSource(PowerSource):
    """Watts at the module's input, from a tegrastats process that lives as long as the source.

    Raises SensorError if there is no such program, or it shows no input rail.
    """

    name = "tegrastats"
    paced = True

    def __init__(self, program: str = "tegrastats", period_s: float = 0.1) -> None:
        self.period_s = period_s
        path = shutil.which(program)
        if path is None:
            raise SensorError(f"{program} is not installed here; in a container it rarely is")
        self._process = subprocess.Popen(
            [path, "--interval", str(round(period_s * 1000))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._unread = b""
        try:
            rails = parse_line(self._line(_FIRST_LINE_S)).rails_w
            total = total_rails(rails)
            if total is None:
                raise SensorError(
                    f"{path} does not show the module's input (VDD_IN), only {', '.join(rails) or 'no'} rails"
                )
        except BaseException:
            self.close()
            raise
        self._total = total
        self.sensor = " + ".join(total)

    def read(self) -> float:
        rails = parse_line(self._line(_PATIENCE_PERIODS * self.period_s)).rails_w
        if missing := [name for name in self._total if name not in rails]:
            raise SensorError(f"{missing[0]}: not in a line of tegrastats")
        return sum(rails[name] for name in self._total)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _line(self, timeout_s: float) -> str:
        """The newest line; lines that nobody asked for in time are dropped, so that a line's time is now."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while True:
            complete = b"\n" in self._unread
            if not select.select([descriptor], [], [], 0 if complete else timeout_s)[0]:
                if complete:
                    break
                raise SensorError(f"tegrastats wrote nothing for {timeout_s:.1f} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                if complete:
                    break
                raise SensorError(f"tegrastats ended with exit status {self._process.wait()}")
            self._unread += data
        lines = self._unread.split(b"\n")
        self._unread = lines[-1]
        return lines[-2].decode(errors="replace")
