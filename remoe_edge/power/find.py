"""Which power sensor to use here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.power.ina3221 import Ina3221Source
from remoe_edge.power.jtop import JtopSource
from remoe_edge.power.nvml import NvmlSource
from remoe_edge.power.powercap import PowercapSource
from remoe_edge.power.source import NoSource, PowerSource, SensorError
from remoe_edge.power.tegrastats import TegrastatsSource

SOURCES = ("ina3221", "jtop", "tegrastats", "powercap", "nvml", "none")

_PREFERENCE = (
    ("ina3221", "the fastest sensor of the whole module"),
    ("tegrastats", "no INA3221 in sysfs; tegrastats shows the whole module"),
    ("jtop", "no INA3221 in sysfs and no tegrastats; jtop shows the whole module"),
    ("powercap", "no Jetson sensor; these counters see the CPU package only"),
)


@dataclass(frozen=True)
class Choice:
    """A source that has given a value, or a `NoSource`; and a sentence that says why it was chosen."""

    source: PowerSource
    why: str


def find_source(name: str = "auto", root: Path = Path("/")) -> Choice:
    """Open the power sensor called `name` (see SOURCES), or the best that works here.

    "auto" never fails: without a sensor the choice is a `NoSource` whose `why` says what was tried. NVML is not
    considered, because it measures one GPU and not the machine. Raises RemoeError if a sensor asked for by name does
    not work here. `root` is the folder that holds ``sys`` and ``run``, for tests.
    """
    makers = _makers(root)
    if name == "none":
        return Choice(NoSource("switched off"), "switched off")
    if name != "auto":
        if name not in makers:
            raise RemoeError(f"there is no power source {name!r}; choose one of auto, {', '.join(SOURCES)}")
        try:
            return Choice(makers[name](), "asked for")
        except SensorError as error:
            raise RemoeError(f"power source {name} does not work here: {error}") from error
    failures = []
    for candidate, why in _PREFERENCE:
        try:
            source = makers[candidate]()
        except SensorError as error:
            failures.append(f"{candidate}: {error}")
        else:
            return Choice(source, why)
    reason = "no power sensor works here (" + "; ".join(failures) + ")"
    return Choice(NoSource(reason), reason)


def _makers(root: Path) -> dict[str, Callable[[], PowerSource]]:
    return {
        "ina3221": partial(Ina3221Source, root),
        "jtop": partial(JtopSource, root=root),
        "tegrastats": TegrastatsSource,
        "powercap": partial(PowercapSource, root),
        "nvml": NvmlSource,
    }
