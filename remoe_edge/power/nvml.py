"""Power of one discrete NVIDIA GPU, through NVML (package nvidia-ml-py, if it is installed).

The GPU alone, not the machine. On Jetson Orin NVML knows no power.
"""

from contextlib import suppress
from typing import Any

from remoe_edge.power.source import PowerSource, SensorError


class NvmlSource(PowerSource):
    """Watts of the GPU `index`; the driver renews the value a few times per second.

    Raises SensorError if there is no NVML, no such GPU, or it does not tell its power.
    """

    name = "nvml"
    period_s = 0.1

    def __init__(self, index: int = 0) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise SensorError("nvidia-ml-py is not installed; pip install nvidia-ml-py") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise SensorError(f"NVML does not start: {error}") from error
        try:
            self._gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(self._gpu)
            self.sensor = f"GPU {index} ({name.decode() if isinstance(name, bytes) else name})"
            self.read()
        except pynvml.NVMLError as error:
            self.close()
            raise SensorError(f"GPU {index}: {error}") from error
        except SensorError:
            self.close()
            raise

    def read(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._gpu)) / 1000
        except self._nvml.NVMLError as error:
            raise SensorError(f"{self.sensor}: power: {error}") from error

    def close(self) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
