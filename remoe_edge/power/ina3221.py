"""The INA3221 chips of a Jetson, read through sysfs: the module's input rail, without root or other programs.

Rails are found by their labels: bus addresses, hwmon numbers and channel numbers differ between boards and releases.
A rail's power is the product of its voltage and current, which the chip measures one after the other.

Format: Documentation/hwmon/ina3221.rst of the Linux kernel; the older IIO driver was NVIDIA's (``rail_name_N``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.power.number_file import NumberFile
from remoe_edge.power.rails import total_rails
from remoe_edge.power.source import PowerSource, SensorError


@dataclass(frozen=True)
class _Rail:
    millivolts: NumberFile
    milliamperes: NumberFile

    def watts(self) -> float:
        return self.millivolts.read() * self.milliamperes.read() / 1e6

    def close(self) -> None:
        self.millivolts.close()
        self.milliamperes.close()


class Ina3221Source(PowerSource):
    """Watts at the module's input (VDD_IN on Orin NX and Nano; the sum of three rails on AGX Orin).

    Raises SensorError if no chip has the rails, or they cannot be read.
    """

    name = "ina3221"
    period_s = 0.02

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._rails: list[_Rail] = []
        labels = dict(_find(root))
        total = total_rails(labels)
        if total is None:
            seen = f"only the rails {', '.join(sorted(labels))}" if labels else "no rails"
            raise SensorError(f"{root / 'sys'}: {seen} of an INA3221 found, not the module's input (VDD_IN)")
        self._names = total
        self.sensor = " + ".join(total)
        self.read()

    def read(self) -> float:
        if not self._rails:
            # Also after an error: a driver that was loaded again has new paths.
            found = dict(_find(self._root))
            if missing := [name for name in self._names if name not in found]:
                raise SensorError(f"{missing[0]}: the sensor is not there any more")
            self._rails = [found[name] for name in self._names]
        try:
            return sum(rail.watts() for rail in self._rails)
        except SensorError:
            self.close()
            raise

    def close(self) -> None:
        for rail in self._rails:
            rail.close()
        self._rails = []


def _find(root: Path) -> Iterator[tuple[str, _Rail]]:
    """Labels and files of all rails, kernel's driver (hwmon) first."""
    sys = root / "sys"
    folders = [*sorted(sys.glob("bus/i2c/drivers/ina3221*/*/hwmon/hwmon*"))]
    folders += [path.parent for path in sorted(sys.glob("class/hwmon/hwmon*/name")) if _label(path) == "ina3221"]
    for folder in folders:
        for label in sorted(folder.glob("in*_label")):
            number = label.name.removeprefix("in").removesuffix("_label")
            # "sum of shunt voltages" is no rail and has no current of the same number.
            if (name := _label(label)) and (folder / f"curr{number}_input").exists():
                yield name, _rail(folder, f"in{number}_input", f"curr{number}_input")
    for label in sorted(sys.glob("bus/i2c/drivers/ina3221*/*/iio:device*/rail_name_*")):
        number = label.name.removeprefix("rail_name_")
        if name := _label(label):
            yield name, _rail(label.parent, f"in_voltage{number}_input", f"in_current{number}_input")


def _rail(folder: Path, voltage: str, current: str) -> _Rail:
    return _Rail(NumberFile(folder / voltage), NumberFile(folder / current))


def _label(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
