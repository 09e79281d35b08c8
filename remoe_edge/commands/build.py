import json
from dataclasses import asdict
from pathlib import Path

import click

from remoe_edge.jetson.build import JetsonOptions, build_bundle
from remoe_edge.jetson.pins import jetpack
from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.build import BuildOptions, check_runtime, ensure_runtime
from remoe_edge.sizes import format_size

_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
_DEFAULT_JETPACK = "7"


@click.command()
@click.option(
    "--source",
    metavar="DIR",
    type=_FOLDER,
    help="Build this llama.cpp checkout (a copy of it) instead of the pinned one.",
)
@click.option(
    "--cuda/--no-cuda",
    default=None,
    help="Build the CUDA backend too; CUDAARCHS chooses the GPU, by default this machine's. "
    "[default: no; for jetson: yes]",
)
@click.option(
    "--jobs",
    "-j",
    metavar="N",
    type=click.IntRange(min=1),
    help="Compilations to run at once. [default: what CPUs and memory allow]",
)
@click.option("--clean", is_flag=True, help="Delete every cached runtime and compile afresh.")
@click.option(
    "--check",
    is_flag=True,
    help="Only say whether the installed runtime matches the sources; exit with 1 if it does not.",
)
@click.option("--target", type=click.Choice(["native", "jetson"]), default="native", help="Compile for a Jetson Orin.")
@click.option("--jetpack", "jetpack_name", metavar="6|7", help="JetPack on the Jetson. [default: 7]")
@click.option("--python", metavar="VERSION", help="Python on the Jetson. [default: the JetPack's: 3.10 or 3.12]")
@click.option(
    "--cuda-toolkit", metavar="DIR", type=_FOLDER, help="CUDA cross toolkit. [default: made from PyPI's wheels]"
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The tarball for the Jetson. [default: remoe-edge-jetpack7.tar.gz]",
)
@click.option("--force", is_flag=True, help="Overwrite an existing --output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    source: Path | None,
    cuda: bool | None,
    jobs: int | None,
    clean: bool,
    check: bool,
    target: str,
    jetpack_name: str | None,
    python: str | None,
    cuda_toolkit: Path | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build the patched llama.cpp and install llama-cpp-python on it.

    \b
    remoe-edge build
    remoe-edge build --target jetson --jetpack 7 -o remoe-edge.tar.gz

    The runtime is compiled once and kept in ~/.cache/remoe-edge (or $REMOE_EDGE_CACHE); every later call and every
    other virtual environment takes it from there. Prints the runtime's folder.

    With --target jetson nothing is installed here: the result is a tarball with all that the Jetson needs beside its
    own Python and CUDA. Unpack it there and start remoe-edge/bin/remoe-edge; `remoe-edge deploy` does that.
    """
    source = source.resolve() if source is not None else None
    if target == "jetson":
        if check:
            raise click.UsageError("--check has no effect with --target jetson.")
        release = jetpack(jetpack_name or _DEFAULT_JETPACK)
        if cuda is False and cuda_toolkit is not None:
            raise click.UsageError("--cuda-toolkit has no effect with --no-cuda.")
        options = JetsonOptions(release, cuda is not False, python, cuda_toolkit, source, jobs, clean)
        path = output or Path(f"remoe-edge-jetpack{release.name}.tar.gz")
        with stderr_progress() as report:
            bundle = build_bundle(options, path, force=force, report=report)
        if as_json:
            click.echo(json.dumps({"path": str(path), "bytes": path.stat().st_size, **asdict(bundle)}))
        else:
            click.echo(path)
            packed, unpacked = format_size(path.stat().st_size), format_size(bundle.unpacked_bytes)
            click.echo(
                f"{packed}, unpacked {unpacked}; for {bundle.machine}, Python {bundle.python}, "
                f"{'with' if bundle.cuda else 'without'} CUDA. On the Jetson: tar xf {path.name} && "
                "remoe-edge/bin/remoe-edge doctor; or from here: remoe-edge deploy HOST MODEL",
                err=True,
            )
        return
    only_jetson = {
        "--jetpack": jetpack_name,
        "--python": python,
        "--cuda-toolkit": cuda_toolkit,
        "--output": output,
        "--force": force or None,
        "--no-cuda": True if cuda is False else None,
    }
    for flag, value in only_jetson.items():
        if value is not None:
            raise click.UsageError(f"{flag} has no effect without --target jetson.")
    native = BuildOptions(cuda=bool(cuda), source=source, jobs=jobs, clean=clean)
    if check:
        differences = check_runtime(native)
        if as_json:
            click.echo(json.dumps({"matches": not differences, "differences": differences}))
        else:
            for difference in differences:
                click.echo(difference)
            click.echo(
                "run remoe-edge build to bring it up to date"
                if differences
                else "the installed runtime matches the sources",
                err=True,
            )
        ctx.exit(1 if differences else 0)
    with stderr_progress() as report:
        runtime = ensure_runtime(native, report)
    if as_json:
        click.echo(
            json.dumps({"root": str(runtime.root), "wheel": str(runtime.wheel), "manifest": asdict(runtime.manifest)})
        )
    else:
        click.echo(runtime.root)
