"""Compiles the runtime for a Jetson on this machine and packs it into a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.files import refuse_existing
from remoe_edge.jetson.bundle import Bundle, write_bundle
from remoe_edge.jetson.check import artefacts, check
from remoe_edge.jetson.cross import cross_compiler
from remoe_edge.jetson.cuda_toolkit import cuda_toolkit
from remoe_edge.jetson.pins import JetPack
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.build import BuildOptions, ensure_runtime


@dataclass(frozen=True)
class JetsonOptions:
    """What to build.

    Attributes
    ----------
    python
        Of the device; by default that of its JetPack.
    toolkit
        A CUDA cross toolkit; by default one is put together from PyPI's wheels, or found where NVIDIA's packages are.
    """

    jetpack: JetPack
    cuda: bool = True
    python: str | None = None
    toolkit: Path | None = None
    source: Path | None = None
    jobs: int | None = None
    clean: bool = False


def build_bundle(options: JetsonOptions, output: Path, *, force: bool = False, report: Report = silent) -> Bundle:
    """Write the bundle to ``output``. Compiled once; later calls take the runtime from the cache.

    Raises RemoeError if a tool is missing, or if what was compiled here would not load on that JetPack.
    """
    refuse_existing(output, force)
    toolkit = _toolkit(options, lambda: cuda_toolkit(report)) if options.cuda else None
    compiler = cross_compiler(toolkit)
    runtime = ensure_runtime(
        BuildOptions(
            cuda=options.cuda, source=options.source, jobs=options.jobs, clean=options.clean, compiler=compiler
        ),
        report,
    )
    problems = check(artefacts(runtime.root), options.jetpack)
    if problems:
        raise RemoeError(f"what was compiled would not work on JetPack {options.jetpack.name}: {problems[0]}")
    return write_bundle(runtime, output, python=options.python or options.jetpack.python, force=force, report=report)


def _toolkit(options: JetsonOptions, from_wheels: Callable[[], Path]) -> Path:
    if options.toolkit is not None:
        return options.toolkit.resolve()
    if options.jetpack.cuda_from == "wheels":
        return from_wheels()
    version = options.jetpack.cuda
    usual = Path(f"/usr/local/cuda-{version}")
    if (usual / "bin" / "nvcc").is_file() and (usual / "targets" / "aarch64-linux").is_dir():
        return usual
    packages = " ".join(f"{name}-{version.replace('.', '-')}" for name in ("cuda-nvcc", "cuda-cross-aarch64"))
    raise RemoeError(
        f"JetPack {options.jetpack.name} has CUDA {version}, whose compiler is not on PyPI: install NVIDIA's packages "
        f"{packages} (Ubuntu {options.jetpack.ubuntu}), name a toolkit with --cuda-toolkit, compile in a container "
        f"with remoe-edge image build --jetpack {options.jetpack.name}, or build without: --no-cuda"
    )
