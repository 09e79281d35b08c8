"""What compiled files need of the machine they are for: read from the ELF files themselves.

ELF: System V ABI, gABI chapters 4 and 5; symbol versions: the Linux Standard Base's section on them. CUDA code lies in
a section ``.nv_fatbin``, whose layout is not documented: NVIDIA's fatbinary header (magic 0xBA55ED50) before entries
that name kind and architecture, as ``cuobjdump --list-elf`` shows them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.errors import RemoeError

_MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_FAT_MAGIC = 0xBA55ED50
_PTX, _ELF = 1, 2
_SHT_DYNAMIC, _SHT_VERNEED = 6, 0x6FFFFFFE
_DT_NEEDED, _DT_RPATH, _DT_RUNPATH = 1, 15, 29


@dataclass(frozen=True)
class Artefact:
    """A shared library or program.

    Attributes
    ----------
    machine
        As ``uname -m`` says it.
    needed
        Libraries it is linked to.
    search
        Where it looks for them first.
    versions
        By library: symbol versions that it needs of it, such as "GLIBC_2.34".
    cubins, ptx
        GPU architectures there is code for, such as "sm_87".
    """

    path: Path
    machine: str
    needed: tuple[str, ...]
    search: str
    versions: dict[str, frozenset[str]]
    cubins: frozenset[str]
    ptx: frozenset[str]

    def newest(self, prefix: str) -> tuple[int, ...] | None:
        """The newest version with a prefix ("GLIBC") that it needs, as numbers; None if it needs none."""
        found = re.compile(rf"{re.escape(prefix)}_([0-9.]+)")
        versions = [m[1] for names in self.versions.values() for name in names if (m := found.fullmatch(name))]
        return max((numbers(version) for version in versions), default=None)


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: "2.35" is (2, 35)."""
    return tuple(int(part) for part in version.split("."))


def is_elf(path: Path) -> bool:
    """Whether a file is an ELF file."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def machine_of(path: Path) -> str:
    """The architecture of an ELF file, as ``uname -m`` says it. Raises RemoeError if it is none."""
    with path.open("rb") as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF" or len(head) < 20:
        raise RemoeError(f"{path} is neither a program nor a library")
    number = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    return _MACHINES.get(number, f"ELF machine {number}")


def read_artefact(path: Path) -> Artefact:
    """Raises RemoeError if the file is no 64-bit little-endian ELF file, or a damaged one."""
    data = path.read_bytes()
    machine = machine_of(path)
    if data[4:6] != b"\x02\x01":
        raise RemoeError(f"{path} is not a 64-bit little-endian ELF file")
    try:
        sections = _sections(data)
        dynamic = next((each for each in sections if each.type == _SHT_DYNAMIC), None)
        needed, search = [], ""
        for tag, value in struct.iter_unpack("<qQ", dynamic.content) if dynamic else ():
            if tag == _DT_NEEDED:
                needed.append(_string(sections[dynamic.link].content, value))  # type: ignore[union-attr]
            elif tag in (_DT_RPATH, _DT_RUNPATH):
                search = _string(sections[dynamic.link].content, value)  # type: ignore[union-attr]
        versions: dict[str, frozenset[str]] = {}
        for section in sections:
            if section.type == _SHT_VERNEED:
                versions.update(_needed_versions(section, sections[section.link].content))
        code = [entry for section in sections if section.name == ".nv_fatbin" for entry in _fat(section.content)]
    except (struct.error, IndexError, ValueError) as error:
        raise RemoeError(f"{path} is damaged: {error}") from error
    return Artefact(
        path,
        machine,
        tuple(needed),
        search,
        versions,
        frozenset(f"sm_{arch}" for kind, arch in code if kind == _ELF),
        frozenset(f"compute_{arch}" for kind, arch in code if kind == _PTX),
    )


@dataclass(frozen=True)
class _Section:
    name: str
    type: int
    link: int
    content: bytes


def _sections(data: bytes) -> list[_Section]:
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", data, start + index * size) for index in range(count)]
    if not headers:
        return []
    _, _, _, _, at, length, _, _ = headers[names]
    strings = data[at : at + length]
    sections = []
    for name, kind, _flags, _address, offset, length, link, _info in headers:
        # SHT_NOBITS has a size and no bytes.
        content = b"" if kind == 8 else data[offset : offset + length]
        if kind != 8 and len(content) != length:
            raise ValueError(f"a section of {length} bytes at offset {offset} ends beyond the file")
        sections.append(_Section(_string(strings, name), kind, link, content))
    return sections


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()


def _needed_versions(section: _Section, strings: bytes) -> Iterator[tuple[str, frozenset[str]]]:
    at = 0
    while section.content:
        _version, count, file, first, following = struct.unpack_from("<HHIII", section.content, at)
        names, entry = [], at + first
        for _ in range(count):
            _hash, _flags, _other, name, step = struct.unpack_from("<IHHII", section.content, entry)
            names.append(_string(strings, name))
            entry += step
        yield _string(strings, file), frozenset(names)
        if not following:
            return
        at += following


def _fat(content: bytes) -> Iterator[tuple[int, int]]:
    """Kind and architecture of every piece of GPU code."""
    at = 0
    while at + 16 <= len(content):
        magic, _version, header, size = struct.unpack_from("<IHHQ", content, at)
        if magic != _FAT_MAGIC:
            # Containers are padded to multiples of 8.
            at += 8
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _unknown, head, length = struct.unpack_from("<HHIQ", content, entry)
            (arch,) = struct.unpack_from("<I", content, entry + 28)
            yield kind, arch
            entry += head + length
        at = end
