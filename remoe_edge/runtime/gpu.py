"""Which GPUs the runtime sees, and how many of a model's layers go there."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remoe_edge.errors import RemoeError

ALL_LAYERS = -1
"""As llama.h has it: a negative number of layers means all."""

_GPU, _INTEGRATED_GPU = 1, 2  # enum ggml_backend_dev_type


@dataclass(frozen=True)
class Device:
    """A GPU of the runtime; sizes in bytes, as the backend reports them.

    Attributes
    ----------
    name, description
        "CUDA0", "Orin".
    free
        On a board whose CPU and GPU share one memory, what the system has free.
    """

    name: str
    description: str
    backend: str
    free: int
    total: int

    @property
    def label(self) -> str:
        return f"{self.description} ({self.name})"


def find_devices(library: ctypes.CDLL) -> list[Device]:
    """The GPUs that ggml in this loaded library can use; none in a build for the CPU."""
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    count = _function(library, "ggml_backend_dev_count", size)
    get = _function(library, "ggml_backend_dev_get", pointer, size)
    kind = _function(library, "ggml_backend_dev_type", ctypes.c_int, pointer)
    name = _function(library, "ggml_backend_dev_name", text, pointer)
    description = _function(library, "ggml_backend_dev_description", text, pointer)
    registry = _function(library, "ggml_backend_dev_backend_reg", pointer, pointer)
    backend = _function(library, "ggml_backend_reg_name", text, pointer)
    memory = _function(library, "ggml_backend_dev_memory", None, pointer, ctypes.POINTER(size), ctypes.POINTER(size))
    found = []
    for index in range(count()):
        device = get(index)
        if kind(device) in (_GPU, _INTEGRATED_GPU):
            free, total = size(), size()
            memory(device, free, total)
            texts = (name(device), description(device), backend(registry(device)))
            named, described, by = (each.decode(errors="replace") for each in texts)
            found.append(Device(named, described, by, free.value, total.value))
    return found


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


def layers_on_gpu(wanted: int | str, devices: Sequence[Device]) -> int:
    """The number that llama.cpp takes; `ALL_LAYERS` for all.

    Parameters
    ----------
    wanted
        A number, "all", or "auto": all where there is a GPU, else none.

    Raises RemoeError if layers are asked for that have no GPU to go to.
    """
    if wanted == "auto":
        return ALL_LAYERS if devices else 0
    layers = ALL_LAYERS if wanted == "all" else int(wanted)
    if layers and not devices:
        raise RemoeError(
            f"--gpu-layers {wanted}: the runtime sees no GPU; `remoe-edge build --cuda` compiles one for NVIDIA's, "
            "`remoe-edge doctor` shows what it sees"
        )
    return layers
