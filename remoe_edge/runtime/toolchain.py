"""The tools that compile the runtime, and what of them shapes its code."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.errors import RemoeError

_APT_COMPILER = "on Debian, Ubuntu and JetPack install one with: sudo apt install build-essential"
_ENVIRONMENT = ("CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS", "CUDAARCHS")
"""Variables that CMake takes compiler settings from."""


@dataclass(frozen=True)
class Compiler:
    """The compilers a build uses, and everything about them that its key must cover."""

    variables: dict[str, str]
    """Environment that makes CMake use exactly these compilers."""
    version: str
    """First line of ``--version``, with nvcc's release line after it in a CUDA build."""
    target: str
    """Digest of the macros the compiler predefines for this machine's CPU: architecture, features, ABI, version."""
    settings: dict[str, str]
    """The user's own compiler settings from the environment."""
    flags: tuple[str, ...] = ()
    """CMake cache settings that the machine compiled for needs."""
    places: tuple[str, ...] = ()
    """CMake cache settings that say where things are on this machine; they shape no code, and no key covers them."""
    platform: str | None = None
    """Of the machine compiled for, as wheels name it ("linux_aarch64"); None: this one."""


def find_compiler(*, cuda: bool) -> Compiler:
    """The C and C++ compilers CMake would choose, and nvcc if ``cuda``. Raises RemoeError if one is missing."""
    cc = _find_compiler("CC", "cc", "gcc", "clang")
    cxx = _find_compiler("CXX", "c++", "g++", "clang++")
    variables = {"CC": cc, "CXX": cxx}
    version = _output([*shlex.split(cxx), "--version"]).splitlines()[0]
    if cuda:
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if nvcc is None:
            raise RemoeError(
                "no nvcc found; on JetPack install it with: sudo apt install nvidia-jetpack (elsewhere: NVIDIA's CUDA "
                "toolkit), or set CUDACXX to its path"
            )
        variables["CUDACXX"] = nvcc
        release = next(line for line in _output([nvcc, "--version"]).splitlines() if "release" in line)
        version += f"; {release}"
    return Compiler(variables, version, _target(cxx), own_settings())


def own_settings() -> dict[str, str]:
    """The user's compiler settings from the environment."""
    return {name: value for name in _ENVIRONMENT if (value := os.environ.get(name))}


def cross_target(machine: str) -> str:
    """The `target` of what was compiled elsewhere for every machine of an architecture ("aarch64")."""
    return f"any {machine}"


def find_tool(name: str) -> Path:
    """The build tool ``name`` (cmake, ninja) on PATH, else the one installed beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise RemoeError(
            f"no {name} found; install it with: pip install 'remoe-edge[build]' "
            "(or on Debian, Ubuntu and JetPack: sudo apt install cmake ninja-build)"
        )
    return Path(found)


def default_jobs() -> int:
    """Compilations to run at once: one per usable CPU, with at least 1 GiB of available memory for each."""
    meminfo = Path("/proc/meminfo").read_text()
    available = int(meminfo.split("MemAvailable:")[1].split()[0]) << 10
    return max(1, min(len(os.sched_getaffinity(0)), available >> 30))


def _find_compiler(variable: str, *names: str) -> str:
    if chosen := os.environ.get(variable):
        if shutil.which(shlex.split(chosen)[0]) is None:
            raise RemoeError(f"{variable} is set to {chosen!r}, which is not a program; unset or correct it")
        return chosen
    for name in names:
        if found := shutil.which(name):
            return found
    language = "C" if variable == "CC" else "C++"
    raise RemoeError(f"no {language} compiler found; {_APT_COMPILER}")


def _target(cxx: str) -> str:
    # GCC and Clang disagree by architecture on which of these names the machine they run on.
    for native in (["-march=native"], ["-mcpu=native"], []):
        command = [*shlex.split(cxx), *native, "-dM", "-E", "-x", "c++", "/dev/null"]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        if result.returncode == 0:
            return hashlib.sha256(b"\n".join(sorted(result.stdout.splitlines()))).hexdigest()
    raise RemoeError(
        f"the C++ compiler {cxx} does not work: {result.stderr.decode(errors='replace').strip()}\n{_APT_COMPILER}"
    )


def _output(command: list[str]) -> str:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        raise RemoeError(f"{shlex.join(command)} failed: {result.stderr.strip()}")
    return result.stdout
