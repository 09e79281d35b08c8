"""Compilers on x86-64 for a Jetson's aarch64."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.jetson.pins import ARCHITECTURE, recipes_dir
from remoe_edge.runtime.toolchain import Compiler, cross_target, own_settings

PREFIX = "aarch64-linux-gnu-"
PLATFORM = "linux_aarch64"
GPU_ARCHITECTURE = "87-real"
"""Orin. Code for it alone: what was compiled for sm_80 is not accepted by every Orin, and PTX is compiled at start."""

_FLAGS = ("GGML_NATIVE=OFF", "GGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16")
_CUDA_FLAGS = (f"CMAKE_CUDA_ARCHITECTURES={GPU_ARCHITECTURE}", "GGML_CUDA_FA=ON", "GGML_CUDA_NCCL=OFF")
_APT = "sudo apt install g++-aarch64-linux-gnu"


def toolchain_file() -> Path:
    """The CMake toolchain file."""
    return recipes_dir() / "toolchain" / "aarch64.cmake"


def cross_compiler(toolkit: Path | None = None) -> Compiler:
    """The cross compilers on this machine, with CUDA if a folder with its cross toolkit is given.

    Raises RemoeError if one is missing.
    """
    cxx = shutil.which(f"{PREFIX}g++")
    if cxx is None or shutil.which(f"{PREFIX}gcc") is None:
        raise RemoeError(f"no {PREFIX}g++ found to compile for {ARCHITECTURE}; on Debian and Ubuntu: {_APT}")
    version = _first_line([cxx, "--version"])
    flags, places = [*_FLAGS], [f"CMAKE_TOOLCHAIN_FILE={toolchain_file()}"]
    if toolkit is not None:
        nvcc = toolkit / "bin" / "nvcc"
        if not nvcc.is_file():
            raise RemoeError(f"{toolkit} is no CUDA toolkit: it has no bin/nvcc; leave the option out to have one made")
        version += f"; {_first_line([str(nvcc), '--version'], 'release')}"
        flags += _CUDA_FLAGS
        places.append(f"REMOE_CUDA_TOOLKIT={toolkit}")
    digest = hashlib.sha256(toolchain_file().read_bytes()).hexdigest()
    return Compiler(
        variables={},
        version=f"{version}; aarch64.cmake {digest[:12]}",
        target=cross_target(ARCHITECTURE),
        settings=own_settings(),
        flags=tuple(flags),
        places=tuple(places),
        platform=PLATFORM,
    )


def _first_line(command: list[str], containing: str = "") -> str:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        raise RemoeError(f"{command[0]} does not work: {result.stderr.strip()}")
    return next(line for line in result.stdout.splitlines() if containing in line)
