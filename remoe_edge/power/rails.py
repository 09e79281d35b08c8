"""Which rails of a Jetson make up the power of its module."""

from collections.abc import Collection

# VDD_IN: Orin NX and Orin Nano. AGX Orin has no input rail with a sensor; these three are what feeds its module.
_TOTALS = (("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))


def total_rails(labels: Collection[str]) -> tuple[str, ...] | None:
    """The rails whose sum is the module's power; None if it cannot be told from `labels`."""
    return next((rails for rails in _TOTALS if all(rail in labels for rail in rails)), None)
