"""Energy counters of the CPU package (RAPL), through the kernel's powercap files.

They count CPU and, on some machines, memory; not the board, drives or GPU. Reading needs root since Linux 5.10.

Format: Documentation/power/powercap/powercap.rst of the Linux kernel.
"""

from dataclasses import dataclass
from pathlib import Path

from remoe_edge.device.sysfs import text
from remoe_edge.power.number_file import NumberFile
from remoe_edge.power.source import PowerSource, SensorError

_ZONES = "sys/class/powercap"


@dataclass
class _Zone:
    energy: NumberFile
    label: str
    range_uj: int
    last_uj: int | None = None
    wrapped_uj: int = 0

    def joules(self) -> float:
        now = self.energy.read()
        if self.last_uj is not None and now < self.last_uj:
            self.wrapped_uj += self.range_uj
        self.last_uj = now
        return (self.wrapped_uj + now) / 1e6


class PowercapSource(PowerSource):
    """Joules of all CPU packages together; a counter's wrap-around is undone.

    Raises SensorError if there are no counters, or they cannot be read.
    """

    name = "powercap"
    period_s = 0.05
    counter = True

    def __init__(self, root: Path = Path("/")) -> None:
        self._zones = _packages(root / _ZONES)
        if not self._zones:
            raise SensorError(f"{root / _ZONES}: no energy counter of a CPU package")
        self.sensor = " + ".join(zone.label for zone in self._zones)
        self.read()

    def read(self) -> float:
        return sum(zone.joules() for zone in self._zones)

    def close(self) -> None:
        for zone in self._zones:
            zone.energy.close()


def _packages(folder: Path) -> list[_Zone]:
    """Top-level zones; those below a package are part of it. "psys" would count the packages a second time."""
    zones: list[_Zone] = []
    for path in sorted(folder.glob("*:*")):
        if path.name.count(":") != 1 or not (path / "energy_uj").exists():
            continue
        label = text(path / "name") or ""
        # The same package shows twice, through the registers and through the memory-mapped interface.
        if label.startswith("package") and label not in {zone.label for zone in zones}:
            range_uj = NumberFile(path / "max_energy_range_uj")
            zones.append(_Zone(NumberFile(path / "energy_uj"), label, range_uj.read()))
            range_uj.close()
    return zones
