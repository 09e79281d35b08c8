"""Puts a bundle or an image and a model on another machine, tries them there, and brings the results back."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remoe_edge.deploy.remote import Remote, check, probe
from remoe_edge.deploy.ssh import Host
from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing, scratch_file
from remoe_edge.gguf_io.layout import read_model, shard_paths
from remoe_edge.jetson.bundle import TOP, Bundle, read_bundle
from remoe_edge.jetson.engine import Engine
from remoe_edge.jetson.pins import ARCHITECTURE
from remoe_edge.progress import Report, silent

# The new one is complete before it takes the place of the old one, and an old one in use goes on running.
_UNPACK = r"""
set -e
folder=$1 name=$2 top=$3
mkdir -p -- "$folder/.new-$name"
tar -xzf "$folder/$name.tar.gz" -C "$folder/.new-$name"
rm -rf -- "$folder/.old-$top"
[ ! -e "$folder/$top" ] || mv -- "$folder/$top" "$folder/.old-$top"
mv -- "$folder/.new-$name/$top" "$folder/$top"
rm -rf -- "$folder/.old-$top" "$folder/.new-$name" "$folder/$name.tar.gz"
"""
_HASHES = 'cd -- "$1" && shift && for file; do sha256sum -- "$file"; done'


@dataclass(frozen=True)
class Deployment:
    """What to bring where.

    Attributes
    ----------
    model
        A GGUF (the first file, if it is split), or None for the packaged demo model.
    tarball, image
        A bundle, or the name of an image that `engine` has; one of them.
    folder
        There; not absolute: below the home folder.
    bench
        Arguments of the short benchmark; empty: none.
    output
        Folder for ``doctor.json`` and ``results.jsonl`` here.
    """

    host: Host
    model: Path | None
    output: Path
    tarball: Path | None = None
    image: str | None = None
    engine: Engine | None = None
    folder: str = "remoe-edge"
    bench: tuple[str, ...] = ("--budget", "auto", "-n", "32", "-r", "1")
    force: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came back; ``doctor`` is None if the machine said nothing that can be read."""

    folder: str
    valid: bool
    findings: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    files: list[str] = field(default_factory=list)


def deploy(deployment: Deployment, report: Report = silent) -> Outcome:
    """Deploy. Raises RemoeError, in one sentence, if the machine cannot be reached, will not do, or a step fails there.

    What was copied stays there, also after a failure, so that the next call copies less.
    """
    host, output = deployment.host, deployment.output
    doctor_file, rows_file = output / "doctor.json", output / "results.jsonl"
    for path in (doctor_file, *((rows_file,) if deployment.bench else ())):
        refuse_existing(path, deployment.force)
    bundle = read_bundle(deployment.tarball) if deployment.tarball else None
    shards = _shards(deployment.model)
    report(f"Looking at {host.name}", None)
    remote = probe(host, deployment.folder)
    check(
        host,
        remote,
        machine=bundle.machine if bundle else ARCHITECTURE,
        python=bundle.python if bundle else None,
        needed=_needed(deployment, bundle, shards),
        image=deployment.image is not None,
    )
    folder = remote.folder
    host.ask(["mkdir", "-p", "--", folder, f"{folder}/models"])
    program = (
        _bring_bundle(host, deployment.tarball, folder, report)
        if deployment.tarball
        else _bring_image(deployment, remote, report)
    )
    for shard in shards:
        host.send(shard, f"{folder}/models/{shard.name}", report)
    if shards:
        report("Comparing what arrived", None)
        _compare(host, shards, f"{folder}/models")
    inside = "/models" if deployment.image else f"{folder}/models"
    model = f"{inside}/{shards[0].name}" if shards else "demo"
    output.mkdir(parents=True, exist_ok=True)
    report(f"Examining {host.name}", None)
    findings = _doctor(host, [*program, "doctor", *([model] if shards else ["--no-storage"]), "--json"])
    with atomic_output(doctor_file, force=deployment.force) as temporary:
        temporary.write_text(json.dumps(findings) + "\n")
    files, rows = [str(doctor_file)], []
    if deployment.bench:
        report(f"A short benchmark on {host.name}", None)
        rows = _bench(deployment, [*program, "bench", model, *deployment.bench], rows_file, report)
        files.append(str(rows_file))
    return Outcome(folder, bool(findings["valid"]), findings["findings"], rows, files)


def _shards(model: Path | None) -> list[Path]:
    if model is None:
        return []
    read_model(model)
    return shard_paths(model)


def _needed(deployment: Deployment, bundle: Bundle | None, shards: Sequence[Path]) -> int:
    total = sum(shard.stat().st_size for shard in shards)
    if bundle and deployment.tarball:
        total += bundle.unpacked_bytes + deployment.tarball.stat().st_size
    elif deployment.engine and deployment.image:
        # Its archive, and then its layers where docker keeps them.
        total += 2 * deployment.engine.size(deployment.image)
    return total


def _bring_bundle(host: Host, tarball: Path, folder: str, report: Report) -> list[str]:
    digest = _sha256(tarball)
    marker = f"{folder}/{TOP}/.tarball-sha256"
    if host.run(["cat", "--", marker]).stdout.strip() != digest:
        name = f"bundle-{digest[:16]}"
        host.send(tarball, f"{folder}/{name}.tar.gz", report, f"Copying {tarball.name}")
        report("Unpacking", None)
        host.script(_UNPACK, folder, name, TOP)
        host.script('printf "%s\\n" "$2" > "$1"', marker, digest)
    # What is made there, such as the demo model, stays in the folder, too.
    return ["env", f"REMOE_EDGE_CACHE={folder}/cache", f"{folder}/{TOP}/bin/remoe-edge"]


def _bring_image(deployment: Deployment, remote: Remote, report: Report) -> list[str]:
    host, engine, image = deployment.host, deployment.engine, deployment.image
    assert engine is not None
    assert image is not None
    folder = remote.folder
    report(f"Saving {image}", None)
    with scratch_file(deployment.output.parent / "image.tar") as archive:
        archive.unlink()
        if engine.name == "docker":
            engine.ask("save", "-o", str(archive), image)
        else:
            engine.ask("push", image, f"docker-archive:{archive}:{image}")
        name = f"image-{secrets.token_hex(4)}.tar"
        host.send(archive, f"{folder}/{name}", report, f"Copying {image}")
    report("Loading the image", None)
    host.ask(["docker", "load", "-q", "-i", f"{folder}/{name}"])
    host.ask(["rm", "-f", "--", f"{folder}/{name}"])
    mounts = ["-v", f"{folder}/models:/models:ro"]
    for path in ("/etc/nv_tegra_release", "/var/lib/nvpmodel", "/etc/nvpmodel.conf"):
        if host.run(["test", "-e", path]).returncode == 0:
            mounts += ["-v", f"{path}:{path}:ro"]
    nvidia = ["--runtime", "nvidia"] if remote.l4t else []
    return ["docker", "run", "--rm", "--ulimit", "memlock=-1", *nvidia, *mounts, image]


def _compare(host: Host, shards: Sequence[Path], folder: str) -> None:
    # By their order: sha256sum escapes names with strange characters in them.
    lines = host.script(_HASHES, folder, *(shard.name for shard in shards)).splitlines()
    for shard, line in zip(shards, lines, strict=True):
        if line.removeprefix("\\")[:64] != _sha256(shard):
            raise RemoeError(
                f"{host.name}: {folder}/{shard.name} is not what was sent; delete it there and run this again"
            )


def _doctor(host: Host, command: Sequence[str]) -> dict[str, Any]:
    result = host.run(command)
    try:
        content: dict[str, Any] = json.loads(result.stdout)
    except ValueError:
        said = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise RemoeError(f"{host.name}: remoe-edge does not start there: {said[-1]}") from None
    return content


def _bench(deployment: Deployment, command: Sequence[str], rows_file: Path, report: Report) -> list[dict[str, Any]]:
    host = deployment.host
    result = host.run(command, report)
    # Without --output the rows come on stdout, so nothing has to be fetched or deleted there.
    try:
        rows = [json.loads(line) for line in result.stdout.splitlines()]
    except ValueError:
        rows = []
    if not rows:
        said = [line for line in result.stderr.splitlines() if line.strip()] or [f"exit status {result.returncode}"]
        raise RemoeError(f"{host.name}: the benchmark failed: {said[-1]}")
    with atomic_output(rows_file, force=deployment.force) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
