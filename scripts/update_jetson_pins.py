"""Writes the wheels and their hashes into jetson/pins.json anew: the CUDA cross toolkit, and remoe-edge's dependencies.

    python scripts/update_jetson_pins.py [--cuda | --python]

The dependencies are resolved for the oldest Python of a JetPack, so that one set of releases fits all; every release is
then fetched for each Python and architecture. Needs pip with access to PyPI; about 900 MB with cuBLAS, and nothing of
it is kept. Look at the difference before committing it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from remoe_edge.jetson.wheels import platform_arguments

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "jetson" / "pins.json"
# JetPack 6, Debian 12 (the stand-in in tests), JetPack 7.
PYTHONS = ("3.10", "3.11", "3.12")
ARCHITECTURES = ("aarch64", "x86_64")
CUDA = {
    "host": ("x86_64", {"nvidia-cuda-nvcc": "13.2.78", "nvidia-nvvm": "13.2.78"}),
    "target": (
        "aarch64",
        {
            "nvidia-cuda-runtime": "13.2.75",
            "nvidia-cuda-crt": "13.2.78",
            "nvidia-cuda-cccl": "13.2.75",
            "nvidia-cuda-culibos": "13.2.75",
            "nvidia-cublas": "13.4.0.1",
        },
    ),
}


def download(requirements: list[str], python: str, machine: str, folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *options]
    subprocess.run([*command, *platform_arguments(python, machine), *requirements], check=True)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wheels_in(folder: Path) -> dict[str, tuple[str, str]]:
    """By name: version and SHA-256."""
    found = {}
    for path in folder.glob("*.whl"):
        name, version = path.name.split("-")[:2]
        found[re.sub(r"[-_.]+", "-", name).lower()] = version, digest(path)
    return found


def cuda() -> dict[str, dict[str, object]]:
    pins: dict[str, dict[str, object]] = {}
    for kind, (machine, versions) in CUDA.items():
        pins[kind] = {}
        for name, version in versions.items():
            with tempfile.TemporaryDirectory() as temporary:
                download([f"{name}=={version}"], "3.12", machine, Path(temporary), "--no-deps")
                pins[kind][name] = {"version": version, "sha256": [wheels_in(Path(temporary))[name][1]]}
            print(kind, name, version, file=sys.stderr)
    return pins


def python() -> dict[str, object]:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.partition("\ndependencies = [\n")[2].partition("\n]")[0]
    wanted = re.findall(r'^\s*"([^"]+)",$', block, re.MULTILINE)
    versions: dict[str, str] = {}
    digests: dict[str, set[str]] = {}
    for release in PYTHONS:
        for machine in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as temporary:
                exact = [f"{name}=={version}" for name, version in versions.items()]
                download(exact or wanted, release, machine, Path(temporary), *(["--no-deps"] if exact else []))
                for name, (version, found) in wheels_in(Path(temporary)).items():
                    versions.setdefault(name, version)
                    digests.setdefault(name, set()).add(found)
            print(release, machine, len(versions), file=sys.stderr)
    return {name: {"version": versions[name], "sha256": sorted(digests[name])} for name in sorted(versions)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--cuda", action="store_true")
    only.add_argument("--python", action="store_true")
    options = parser.parse_args()
    pins = json.loads(PINS.read_text())
    if not options.python:
        pins["cuda_wheels"] = cuda()
    if not options.cuda:
        pins["python_wheels"] = python()
    PINS.write_text(json.dumps(pins, indent=4) + "\n")


if __name__ == "__main__":
    main()
