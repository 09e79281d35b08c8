"""What a machine that is to be deployed to is, and whether it will do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from remoe_edge.deploy.ssh import Host
from remoe_edge.errors import RemoeError
from remoe_edge.jetson.pins import jetpack_of
from remoe_edge.sizes import format_size

# One connection: machine, home, free KiB where the folder will be, L4T, Pythons, programs.
_PROBE = r"""
folder=$1
case $folder in /*) ;; *) folder=$HOME/$folder ;; esac
at=$folder
while [ ! -e "$at" ]; do at=$(dirname -- "$at"); done
echo "machine $(uname -m)"
echo "folder $folder"
echo "free $(df -Pk -- "$at" | awk 'NR == 2 { print $4 }')"
[ -w "$at" ] && echo "writable $at" || echo "unwritable $at"
[ -r /etc/nv_tegra_release ] && sed -n 's/^# R\([0-9]*\).*REVISION: \([0-9.]*\).*/l4t \1.\2/p' /etc/nv_tegra_release
for python in python3 python3.10 python3.11 python3.12 python3.13; do
    "$python" -c 'import sys; print("python %d.%d" % sys.version_info[:2])' 2>/dev/null
done
for program in rsync docker; do
    command -v "$program" >/dev/null && echo "program $program"
done
if command -v docker >/dev/null; then docker info >/dev/null 2>&1 && echo "program docker-answers"; fi
true
"""


@dataclass(frozen=True)
class Remote:
    """What was found there; ``folder`` is absolute."""

    machine: str
    folder: str
    free_bytes: int
    writable: bool
    l4t: str | None
    pythons: frozenset[str]
    programs: frozenset[str]


def probe(host: Host, folder: str) -> Remote:
    """Look at the machine. Raises RemoeError if it cannot be reached."""
    output = host.script(_PROBE, folder)
    found = re.findall(r"^(\w+) (.+)$", output, re.MULTILINE)
    values = dict(found)
    try:
        return Remote(
            machine=values["machine"],
            folder=values["folder"],
            free_bytes=int(values["free"]) * 1024,
            writable="writable" in values,
            l4t=values.get("l4t"),
            pythons=frozenset(value for name, value in found if name == "python"),
            programs=frozenset(value for name, value in found if name == "program"),
        )
    except (KeyError, ValueError):
        raise RemoeError(f"{host.name} is no Linux machine with a POSIX shell: {output.strip()[:200]!r}") from None


def check(host: Host, remote: Remote, *, machine: str, python: str | None, needed: int, image: bool) -> None:
    """Raise RemoeError, in one sentence, if the machine will not do.

    Parameters
    ----------
    machine, python
        What is to run there is for these; python None: it brings its own.
    needed
        Bytes that will be written to the folder.
    """
    if remote.l4t is not None:
        jetpack_of(remote.l4t)
    if remote.machine != machine:
        raise RemoeError(f"{host.name} is {remote.machine}, but what is to run there is for {machine}")
    if "rsync" not in remote.programs:
        raise RemoeError(f"{host.name} has no rsync; install it there: sudo apt install rsync")
    if image and "docker-answers" not in remote.programs:
        there = (
            "does not answer there (is your user in the group docker?)"
            if "docker" in remote.programs
            else "is not there"
        )
        raise RemoeError(f"{host.name}: docker {there}; deploy a tarball instead of an image")
    if python is not None and python not in remote.pythons:
        raise RemoeError(
            f"{host.name} has Python {', '.join(sorted(remote.pythons)) or 'none'}, but the tarball is for {python}; "
            "make another: remoe-edge build --target jetson --python VERSION"
        )
    if not remote.writable:
        raise RemoeError(f"{host.name}: {remote.folder} may not be written; name another folder with --folder")
    if remote.free_bytes < needed:
        raise RemoeError(
            f"{host.name}: {remote.folder} has {format_size(remote.free_bytes)} free, and {format_size(needed)} are "
            "needed; free some there, or name a folder on another drive with --folder"
        )
