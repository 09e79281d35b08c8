"""jetson-stats (jtop): the module's power from its service. Slow: half a second between values.

jetson-stats is AGPL-3.0. It is imported here and nowhere else, only when this source is opened, and comes with
remoe-edge[jetson] only.
"""

from pathlib import Path
from typing import Any

from remoe_edge.power.source import PowerSource, SensorError

_SOCKET = "run/jtop.sock"


class JtopSource(PowerSource):
    """Watts of jtop's total ("tot"), on Orin NX the rail VDD_IN.

    The service has one pace for all its clients, set by the first. Raises SensorError if jetson-stats is not installed
    or its service does not run. `root` is where the service's socket is looked for, not where jtop connects.
    """

    name = "jtop"
    paced = True

    def __init__(self, period_s: float = 0.5, root: Path = Path("/")) -> None:
        # Looked at first: importing jtop changes how this process forks, and its client starts threads at once.
        if not (root / _SOCKET).exists():
            advice = "pip install jetson-stats, then sudo jtop --install-service"
            raise SensorError(f"jtop's service does not run here, there is no {root / _SOCKET} ({advice})")
        try:
            from jtop import jtop
        except ImportError as error:
            raise SensorError("jetson-stats is not installed; pip install 'remoe-edge[jetson]'") from error
        self._client: Any = jtop(period_s)
        try:
            self._client.start()
        except Exception as error:  # jtop raises many kinds, those of sockets and queues among them
            raise SensorError(f"jtop's service does not answer: {_sentence(error)}") from error
        try:
            self.period_s = float(self._client.interval)
            self.sensor = str(self._total().get("name", "tot"))
            self.read()
        except BaseException:
            self.close()
            raise

    def read(self) -> float:
        try:
            alive = self._client.ok()  # waits for the next value
        except Exception as error:
            raise SensorError(f"jtop's service went away: {_sentence(error)}") from error
        if not alive:
            raise SensorError("jtop's service sends nothing any more")
        try:
            return float(self._total()["power"]) / 1000
        except (KeyError, TypeError, ValueError) as error:
            raise SensorError(f"jtop's total has no power: {self._total()!r}") from error

    def close(self) -> None:
        self._client.close()

    def _total(self) -> dict[str, Any]:
        power = self._client.power
        total = power.get("tot") if isinstance(power, dict) else None
        if not isinstance(total, dict):
            raise SensorError("jtop shows no power sensors")
        return total


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
