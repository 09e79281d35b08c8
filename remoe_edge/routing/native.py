"""The simulator's event loop in machine code, around the policies of the runtime themselves.

`native.cpp` and the runtime's `llama-expert-policy.cpp` are compiled at the first use with the system's C++ compiler,
which `remoe-edge build` needs as well, and kept in the cache folder. Why: docs/decisions/0009-simulator-speed.md.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, cache_dir
from remoe_edge.runtime.pin import patches_dir
from remoe_edge.runtime.toolchain import find_compiler

# Floats must come out as the runtime's do: no operations contracted into one, no instructions of this CPU alone.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
_UNKNOWN_POLICY = 1
_COMPILE_S = 300


def replay(
    policy: str,
    ids: npt.NDArray[np.uint16],
    offs: npt.NDArray[np.int64],
    *,
    experts: int,
    slots: int,
    cold: bool,
    victims: npt.NDArray[np.uint16] | None = None,
) -> npt.NDArray[np.int64]:
    """Run one layer of a trace; other threads go on meanwhile.

    Parameters
    ----------
    policy
        A key of POLICIES.
    ids
        [tokens, k], contiguous; NOT_COMPUTED where the layer has no event.
    offs
        [sequences + 1], tokens at which sequences begin.
    slots
        At least k.
    cold
        Cache and policy start anew with every sequence.
    victims
        Receives the evicted experts in their order, if it has room for ids.size of them.

    Returns [sequences, 3]: hits, misses and evictions. Raises RemoeError if there is no compiler that works.
    """
    sequences = len(offs) - 1
    if not (ids.flags.c_contiguous and offs.flags.c_contiguous and offs[-1] == len(ids) and slots >= ids.shape[1]):
        raise ValueError("ids and offs do not belong together")
    if victims is not None and not (victims.flags.c_contiguous and victims.size >= ids.size):
        raise ValueError(f"victims has room for {victims.size} experts, expected {ids.size}")
    counters = np.zeros((sequences, 3), np.uint64)
    status = _library().remoe_simulate_layer(
        policy.encode(),
        experts,
        ids.shape[1],
        slots,
        ids.ctypes.data,
        offs.ctypes.data,
        sequences,
        cold,
        counters.ctypes.data,
        None if victims is None else victims.ctypes.data,
    )
    if status == _UNKNOWN_POLICY:
        raise ValueError(f"no policy {policy!r}")
    if status:
        raise MemoryError(f"no memory to simulate {policy} with {slots} slots of {experts} experts")
    return counters.astype(np.int64)


def prepare() -> None:
    """Compile, unless that was done before; takes seconds. Raises RemoeError if there is no compiler that works."""
    _library()


@cache
def _library() -> Any:
    path = _compiled()
    try:
        library = ctypes.CDLL(str(path))
        function = library.remoe_simulate_layer
    except (OSError, AttributeError) as error:
        raise RemoeError(f"{path}: cannot be loaded ({error}); delete it, it is compiled again") from error
    number, pointer = ctypes.c_int, ctypes.c_void_p
    function.restype = number
    function.argtypes = [
        *(ctypes.c_char_p, number, number, number, pointer, pointer),
        *(ctypes.c_int64, number, pointer, pointer),
    ]
    return library


def _compiled() -> Path:
    """The shared library for these sources and this compiler, from the cache folder or new."""
    compiler = find_compiler(cuda=False)
    policies = patches_dir() / "sources" / "src"
    sources = [Path(__file__).with_suffix(".cpp"), policies / "llama-expert-policy.cpp"]
    digest = hashlib.sha256(repr((platform.machine(), compiler.version, compiler.settings, _FLAGS)).encode())
    for path in (*sources, policies / "llama-expert-policy.h"):
        digest.update(path.read_bytes())
    target = cache_dir() / "simulator" / f"{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*shlex.split(compiler.variables["CXX"]), *_FLAGS, f"-I{policies}", *map(str, sources)]
    with atomic_output(target, force=True) as temporary:
        try:
            result = subprocess.run(
                [*command, "-o", str(temporary)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_COMPILE_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RemoeError(f"the simulator cannot be compiled: {error}") from error
        if result.returncode:
            raise RemoeError(f"the simulator cannot be compiled: {shlex.join(command)}: {result.stderr.strip()}")
    return target
