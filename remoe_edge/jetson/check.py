"""Whether compiled files will load on a Jetson: architecture, symbol versions, GPU code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from remoe_edge.jetson.artefacts import Artefact, is_elf, numbers, read_artefact
from remoe_edge.jetson.pins import ARCHITECTURE, JetPack

GPU = "sm_87"
# GCC's own versions go with those of libstdc++: GCC 12 and 13.
_CXXABI = {"3.4.30": "1.3.13", "3.4.33": "1.3.14"}


def artefacts(folder: Path) -> list[Artefact]:
    """Every ELF file in a folder and below it, by path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return [read_artefact(path) for path in paths if is_elf(path)]


def check(found: Iterable[Artefact], release: JetPack) -> list[str]:
    """What would not work on a JetPack's system; one sentence for each problem, none if all is well."""
    return [f"{artefact.path}: {problem}" for artefact in found for problem in _problems(artefact, release)]


def _problems(artefact: Artefact, release: JetPack) -> Iterator[str]:
    if artefact.machine != ARCHITECTURE:
        yield f"is for {artefact.machine}, not {ARCHITECTURE}"
        return
    limits = {"GLIBC": release.glibc, "GLIBCXX": release.glibcxx, "CXXABI": _CXXABI[release.glibcxx]}
    for prefix, limit in limits.items():
        newest = artefact.newest(prefix)
        if newest is not None and newest > numbers(limit):
            needed = ".".join(map(str, newest))
            yield f"needs {prefix}_{needed}, and Ubuntu {release.ubuntu} has {limit}: compile it on an older system"
    for place in artefact.search.split(":"):
        if place and not place.startswith("$ORIGIN"):
            yield f"looks for libraries in {place}, a folder of the machine it was compiled on"
    if artefact.ptx:
        yield f"has PTX ({', '.join(sorted(artefact.ptx))}), which the device would compile at start"
    if wrong := artefact.cubins - {GPU}:
        yield f"has GPU code for {', '.join(sorted(wrong))}; an Orin is {GPU}"
    if artefact.path.name == "libggml-cuda.so" and not artefact.cubins:
        yield f"has no GPU code for {GPU}"
