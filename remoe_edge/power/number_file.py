"""A file of sysfs with one number, read again and again."""

import os
from pathlib import Path

from remoe_edge.power.source import SensorError

_MOST_BYTES = 64


class NumberFile:
    """Kept open between readings: opening it for each would cost a sampler ten times the CPU time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def read(self) -> int:
        """The number, zero or more. Raises SensorError, and closes the file, if there is none."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            content = os.pread(self._descriptor, _MOST_BYTES, 0)
        except PermissionError as error:
            self.close()
            raise SensorError(f"{self.path}: permission denied; run as root, or make it readable") from error
        except OSError as error:
            self.close()
            raise SensorError(f"{self.path}: cannot be read: {error.strerror}") from error
        text = content.strip()
        if not text.isdigit():
            self.close()
            raise SensorError(f"{self.path}: holds {text.decode(errors='replace')[:40]!r}, not a number")
        return int(text)

    def close(self) -> None:
        """Close the file; the next reading opens it anew."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
