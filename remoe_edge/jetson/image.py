"""Builds the container image: puts together what the recipe copies, chooses its arguments, calls the engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.files import cache_dir, scratch_folder
from remoe_edge.jetson.bundle import read_bundle
from remoe_edge.jetson.cuda_toolkit import TOOLKIT_PYTHON
from remoe_edge.jetson.engine import Engine, check_emulation, check_space, run_build
from remoe_edge.jetson.package import write_package
from remoe_edge.jetson.pins import ARCHITECTURE, JetPack, cuda_wheels, python_wheels, recipes_dir
from remoe_edge.jetson.wheels import fetch_wheels, project, wheels_dir
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.pin import load_pin, patches_dir
from remoe_edge.runtime.sdist import fetch_sdist

_GIB = 1 << 30
_SPACE = {True: 14 * _GIB, False: 2 * _GIB}
"""About what building takes, with CUDA and without: base image, toolkit with cuBLAS, layers."""
_COMPILE_PACKAGES = ("click", "rich", "pygments", "markdown-it-py", "mdurl")
"""What `remoe-edge build` imports: pure Python, so the wheels for the Jetson serve here, too."""


@dataclass(frozen=True)
class ImagePlan:
    """What is to be built.

    Attributes
    ----------
    build_image, runtime_image
        Base images of the two stages; by default those of the JetPack's pins.
    tarball
        A bundle to put into the image as it is; by default it is compiled in the build stage.
    local
        The engine has both base images; nothing is fetched then.
    """

    jetpack: JetPack
    engine: Engine
    tag: str
    build_image: str
    runtime_image: str
    python: str
    cuda: bool = True
    tarball: Path | None = None
    jobs: int | None = None
    local: bool = False

    @property
    def arguments(self) -> dict[str, str]:
        """The recipe's arguments."""
        return {
            "BUILD_IMAGE": self.build_image,
            "RUNTIME_IMAGE": self.runtime_image,
            "JETPACK": self.jetpack.name,
            "CUDA": "1" if self.cuda else "0",
            "CUDA_VERSION_WANTED": self.jetpack.cuda,
            "PYTHON": self.python,
            "JOBS": str(self.jobs or ""),
            "VERSION": __version__,
            "REVISION": _revision(),
        }

    def command(self, context: Path) -> list[str]:
        """The engine's subcommand and its arguments."""
        arguments = [each for name, value in self.arguments.items() for each in ("--build-arg", f"{name}={value}")]
        recipe = ["-f", str(context / "Dockerfile"), "-t", self.tag, *arguments]
        if self.engine.name == "docker":
            options = ["--load", "--progress", "plain", "--platform", "linux/arm64"]
            return ["buildx", "build", *options, *recipe, str(context)]
        # HEALTHCHECK is known to Docker's format only. As root and without a daemon, chroot is what works everywhere.
        options = ["--format", "docker", "--isolation", "chroot", "--arch", "arm64"]
        options += ["--pull-never"] if self.local else []
        return ["bud", *options, *recipe, str(context)]


@dataclass(frozen=True)
class Image:
    """An image that was built; ``bytes`` is its size, unpacked."""

    tag: str
    engine: str
    jetpack: str
    cuda: bool
    bytes: int
    sbom: str = field(repr=False)


def build_image(plan: ImagePlan, report: Report = silent) -> Image:
    """Build an image. Raises RemoeError with the reason if that fails; what was there under the tag before stays."""
    check_tarball(plan)
    check_bases(plan)
    check_emulation(plan.engine)
    check_space(plan.engine.storage(), _SPACE[plan.cuda] if plan.tarball is None else _GIB, "the image")
    with context(plan, report) as folder:
        log = cache_dir() / "image.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        report("Building the image", None)
        run_build(plan.engine, plan.command(folder), log, report)
    report("Reading the image", None)
    sbom = plan.engine.read(plan.tag, "/opt/remoe-edge/sbom.cdx.json").decode()
    size = plan.engine.size(plan.tag)
    return Image(plan.tag, plan.engine.name, plan.jetpack.name, plan.cuda, size, sbom)


def check_tarball(plan: ImagePlan) -> None:
    """Raise RemoeError if the bundle is not for this image."""
    if plan.tarball is None:
        return
    bundle = read_bundle(plan.tarball)
    if bundle.machine != ARCHITECTURE:
        raise RemoeError(
            f"{plan.tarball} is for {bundle.machine}, but a Jetson is {ARCHITECTURE}; make one with: "
            "remoe-edge build --target jetson"
        )
    if bundle.python != plan.python:
        raise RemoeError(
            f"{plan.tarball} is for Python {bundle.python}, the image for {plan.python}; pass --python {bundle.python} "
            "or make another"
        )
    if bundle.cuda != plan.cuda:
        held, wanted = ("with", "without") if bundle.cuda else ("without", "with")
        raise RemoeError(
            f"{plan.tarball} is {held} CUDA, the image is to be {wanted} it; "
            + ("leave out --no-cuda" if bundle.cuda else "pass --no-cuda, or make another")
        )


def check_bases(plan: ImagePlan) -> None:
    """Raise RemoeError if a base image that the engine has is for another architecture; others it fetches itself."""
    for option, image, wanted in (
        ("--build-image", plan.build_image, "amd64"),
        ("--runtime-image", plan.runtime_image, "arm64"),
    ):
        if plan.engine.exists(image) and (found := plan.engine.architecture(image)) != wanted:
            raise RemoeError(f"{image} is for {found}, and has to be for {wanted}; name another with {option}")


@contextmanager
def context(plan: ImagePlan, report: Report = silent) -> Iterator[Path]:
    """A folder with everything that the recipe copies."""
    with scratch_folder("remoe-edge-image-") as folder:
        shutil.copyfile(recipes_dir() / "Dockerfile", folder / "Dockerfile")
        shutil.copytree(recipes_dir() / "image", folder / "image")
        inner = folder / "context"
        inner.mkdir()
        shutil.copyfile(recipes_dir() / "image" / "build.sh", inner / "build.sh")
        if plan.tarball is not None:
            _place(plan.tarball, inner / "bundle.tar.gz")
        else:
            _sources(plan, inner, report)
        yield folder


def _sources(plan: ImagePlan, inner: Path, report: Report) -> None:
    """The pinned source, and every wheel that building takes, in a cache folder as `remoe-edge build` expects it."""
    cache = inner / "cache"
    wheels = [(python_wheels(), plan.python, ARCHITECTURE)]
    if plan.cuda and plan.jetpack.cuda_from == "wheels":
        wheels += [
            (cuda_wheels("host"), TOOLKIT_PYTHON, "x86_64"),
            (cuda_wheels("target"), TOOLKIT_PYTHON, ARCHITECTURE),
        ]
    elif plan.cuda:
        shutil.copyfile(recipes_dir() / "image" / "cuda-packages.sh", inner / "cuda-packages.sh")
    packages = []
    for which, python, machine in wheels:
        for path in fetch_wheels(which, python, machine, report):
            place = wheels_dir(cache, python, machine) / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            _place(path, place)
            if project(path) in _COMPILE_PACKAGES:
                packages.append(place)
    sdist = fetch_sdist(load_pin(patches_dir()))
    (cache / "sdist").mkdir(parents=True, exist_ok=True)
    _place(sdist, cache / "sdist" / sdist.name)
    packages.append(write_package(inner))
    inside = [f"/context/{path.relative_to(inner).as_posix()}" for path in packages]
    (inner / "build-wheels.txt").write_text("\n".join(inside) + "\n")
    (inner / "python.txt").write_text(f"{plan.python}\n")


def _place(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _revision() -> str:
    """The commit of the checkout that is running; empty elsewhere."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return ""
    result = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return result.stdout.strip()
