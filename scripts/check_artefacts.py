"""Asserts that compiled files will load on a Jetson: architecture, glibc, libstdc++, search paths, GPU code.

    python scripts/check_artefacts.py FOLDER [--jetpack 6] [--jetpack 7]

Reads the files themselves; neither readelf nor cuobjdump is needed. Ends with 1 and one line for each problem.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from remoe_edge.jetson.check import artefacts, check
from remoe_edge.jetson.pins import jetpack


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jetpack", action="append", help="default: 6 and 7")
    options = parser.parse_args()
    found = artefacts(options.folder)
    if not found:
        print(f"{options.folder}: no programs or libraries in it", file=sys.stderr)
        return 1
    problems = []
    for name in options.jetpack or ["6", "7"]:
        problems += [f"JetPack {name}: {problem}" for problem in check(found, jetpack(name))]
    for artefact in found:
        needs = ", ".join(
            f"{prefix} {'.'.join(map(str, version))}"
            for prefix in ("GLIBC", "GLIBCXX", "CXXABI")
            if (version := artefact.newest(prefix)) is not None
        )
        gpu = f"; {', '.join(sorted(artefact.cubins | artefact.ptx))}" if artefact.cubins | artefact.ptx else ""
        print(f"{artefact.path.relative_to(options.folder)}: {artefact.machine}; {needs}{gpu}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
