"""What a bundle or an image is made of, as a CycloneDX 1.5 document.

In an image it is run as a program, once everything is in place: ``python -m remoe_edge.jetson.sbom FILE`` adds the
distribution's packages to what the bundle's document lists.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remoe_edge import __version__
from remoe_edge.runtime.wheel import Manifest

Component = dict[str, Any]


def write_sbom(site: Path, manifest: Manifest, path: Path) -> None:
    """Write the document for the Python packages in ``site`` and for the runtime."""
    components = sorted([*_python(site), *_runtime(manifest)], key=lambda each: each["bom-ref"])
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": "remoe-edge",
                "name": "remoe-edge",
                "version": __version__,
                "licenses": [{"license": {"id": "MIT"}}],
            }
        },
        "components": components,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def add_packages(path: Path, root: Path = Path("/")) -> int:
    """Add the Debian packages installed under ``root`` to a document; return how many."""
    document = json.loads(path.read_text())
    packages = list(_debian(root))
    known = {each["bom-ref"] for each in packages}
    kept = [each for each in document["components"] if each["bom-ref"] not in known]
    document["components"] = sorted([*kept, *packages], key=lambda each: each["bom-ref"])
    path.write_text(json.dumps(document, indent=1) + "\n")
    return len(packages)


def _python(site: Path) -> Iterator[Component]:
    for distribution in importlib.metadata.distributions(path=[str(site)]):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name == "remoe-edge":
            continue
        named = (distribution.metadata.get_all(field) for field in ("License-Expression", "License"))
        licence = next((found[0] for found in named if found), "")
        yield _component(
            name, distribution.version, f"pkg:pypi/{name}@{distribution.version}", licence.splitlines()[:1]
        )


def _runtime(manifest: Manifest) -> Iterator[Component]:
    commit = manifest.llama_cpp
    component = _component("llama.cpp", commit, f"pkg:github/ggml-org/llama.cpp@{commit}", ["MIT"])
    component["pedigree"] = {"notes": f"with remoe-edge's patches, SHA-256 {manifest.patches}"}
    yield component


def _debian(root: Path) -> Iterator[Component]:
    """From dpkg's own list: its format is that of deb822, one paragraph for each package."""
    release = (root / "etc/os-release").read_text()
    vendor = re.search(r"^ID=\"?(\w+)", release, re.MULTILINE)
    for paragraph in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(re.findall(r"^([A-Z][\w-]+): (.+)$", paragraph, re.MULTILINE))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version = fields["Package"], fields["Version"]
        purl = f"pkg:deb/{vendor[1] if vendor else 'debian'}/{name}@{version}?arch={fields['Architecture']}"
        yield _component(name, version, purl)


def _component(name: str, version: str, purl: str, licences: list[str] | None = None) -> Component:
    component: Component = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if licences and licences[0]:
        component["licenses"] = [{"license": {"name": licences[0]}}]
    return component


if __name__ == "__main__":
    print(f"{add_packages(Path(sys.argv[1]))} packages of the distribution listed")
