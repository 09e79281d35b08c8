"""`remoe-edge image`: container images for JetPack."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import click

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.jetson.container import RunOptions, check_image, has_nvidia, plan_run, run_container
from remoe_edge.jetson.engine import ENGINES, Engine, find_engine
from remoe_edge.jetson.image import ImagePlan, build_image, check_tarball
from remoe_edge.jetson.pins import jetpack
from remoe_edge.progress import stderr_progress
from remoe_edge.sizes import format_size, parse_size

_ENGINE = click.option("--engine", type=click.Choice(ENGINES), help="[default: the first of these that answers]")
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("image")
def command() -> None:
    """Build and run container images for JetPack 6 and 7."""


@command.command("build")
@click.option("--jetpack", "jetpack_name", metavar="6|7", required=True, help="JetPack of the device.")
@_ENGINE
@click.option("-t", "--tag", help="Name of the image. [default: remoe-edge:jetpack6 or remoe-edge:jetpack7]")
@click.option(
    "--runtime-image", metavar="IMAGE", help="Base of the image, for arm64. [default: NVIDIA's, see --dry-run]"
)
@click.option(
    "--build-image",
    "build_image_name",
    metavar="IMAGE",
    help="Ubuntu or Debian for x86-64 to compile in. [default: Ubuntu's]",
)
@click.option("--no-cuda", is_flag=True, help="Without the CUDA backend.")
@click.option("--python", metavar="VERSION", help="Python of the runtime image. [default: 3.10 or 3.12]")
@click.option("--tarball", metavar="FILE", type=_FILE, help="Put in what remoe-edge build --target jetson made.")
@click.option("-j", "--jobs", metavar="N", type=click.IntRange(min=1), help="Compilations to run at once.")
@click.option(
    "--sbom", metavar="FILE", type=click.Path(path_type=Path), help="Write the list of components (CycloneDX)."
)
@click.option("--force", is_flag=True, help="Overwrite an existing --sbom.")
@click.option("--dry-run", is_flag=True, help="Print the whole plan, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(
    jetpack_name: str,
    engine: str | None,
    tag: str | None,
    runtime_image: str | None,
    build_image_name: str | None,
    no_cuda: bool,
    python: str | None,
    tarball: Path | None,
    jobs: int | None,
    sbom: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build the image for a JetPack: cross-compiled on x86-64, small, not root.

    \b
    remoe-edge image build --jetpack 7
    remoe-edge image build --jetpack 6 --engine buildah -t remoe-edge:jp6 --dry-run

    JetPack 6 is Ubuntu 22.04 with CUDA 12.6, JetPack 7.2 is Ubuntu 24.04 with CUDA 13.2. The list of components lies in
    the image, too: /opt/remoe-edge/sbom.cdx.json.
    """
    if force and sbom is None:
        raise click.UsageError("--force has no effect without --sbom.")
    if jobs is not None and tarball is not None:
        raise click.UsageError("--jobs has no effect with --tarball, which is compiled already.")
    if sbom is not None:
        refuse_existing(sbom, force)
    release = jetpack(jetpack_name)
    try:
        found = find_engine(engine)
    except RemoeError as error:
        if not dry_run:
            raise
        click.echo(f"Note: {error}", err=True)
        found = Engine(engine or ENGINES[0], engine or ENGINES[0])
    images = build_image_name or release.build_image, runtime_image or release.runtime_image
    plan = ImagePlan(
        jetpack=release,
        engine=found,
        tag=tag or f"remoe-edge:jetpack{release.name}",
        build_image=images[0],
        runtime_image=images[1],
        python=python or release.python,
        cuda=not no_cuda,
        tarball=tarball,
        jobs=jobs,
        local=shutil.which(found.program) is not None and all(found.exists(image) for image in images),
    )
    if dry_run:
        check_tarball(plan)
        _print_plan(plan, as_json)
        return
    with stderr_progress() as report:
        image = build_image(plan, report)
    if sbom is not None:
        with atomic_output(sbom, force=force) as temporary:
            temporary.write_text(image.sbom)
    components = len(json.loads(image.sbom)["components"])
    if as_json:
        content = asdict(image)
        del content["sbom"]
        click.echo(json.dumps({**content, "components": components}))
    else:
        click.echo(image.tag)
        click.echo(
            f"{format_size(image.bytes)}, {components} components; run it on the Jetson: remoe-edge deploy HOST MODEL "
            f"--image {image.tag}",
            err=True,
        )


def _print_plan(plan: ImagePlan, as_json: bool) -> None:
    command = plan.engine.command(*plan.command(Path("CONTEXT")))
    content = {
        "jetpack": plan.jetpack.name,
        "ubuntu": plan.jetpack.ubuntu,
        "l4t": list(plan.jetpack.l4t),
        "cuda": plan.jetpack.cuda if plan.cuda else None,
        "cuda_from": plan.jetpack.cuda_from if plan.cuda and plan.tarball is None else None,
        "gpu_architecture": "87-real" if plan.cuda else None,
        "engine": plan.engine.name,
        "tag": plan.tag,
        "tarball": str(plan.tarball) if plan.tarball else None,
        "arguments": plan.arguments,
        "command": command,
    }
    if as_json:
        click.echo(json.dumps(content))
        return
    where = {"packages": "NVIDIA's cross packages", "wheels": "PyPI wheels", None: "-"}
    click.echo(f"JetPack {plan.jetpack.name}: Ubuntu {plan.jetpack.ubuntu}, L4T {', '.join(plan.jetpack.l4t)}.x")
    if plan.cuda:
        click.echo(f"CUDA {plan.jetpack.cuda}, GPU code for 87-real, toolkit from {where[plan.jetpack.cuda_from]}")
    else:
        click.echo("Without CUDA")
    click.echo(f"Compile in {plan.build_image} (linux/amd64)" if plan.tarball is None else f"Take {plan.tarball}")
    click.echo(f"Image on {plan.runtime_image} (linux/arm64), Python {plan.python}")
    click.echo(shlex.join(command))


@command.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_ENGINE
@click.option("-t", "--tag", default="remoe-edge:jetpack7", show_default=True, help="Name of the image.")
@click.option("--models", metavar="DIR", type=click.Path(path_type=Path), help="Folder to show as /models.")
@click.option("--memory", metavar="SIZE", help="What the container may take; the kernel keeps it.")
@click.option("--port", metavar="N", type=click.IntRange(1, 65535), help="Local port for serve, which listens on 8080.")
@click.option("--root", "as_root", is_flag=True, help="As root in the container: bench --memory-limit needs it.")
@click.option("--dry-run", is_flag=True, help="Only print the command and what is missing.")
@click.argument("arguments", metavar="-- COMMAND...", nargs=-1, required=True)
@click.pass_context
def run(
    ctx: click.Context,
    engine: str | None,
    tag: str,
    models: Path | None,
    memory: str | None,
    port: int | None,
    as_root: bool,
    dry_run: bool,
    arguments: tuple[str, ...],
) -> None:
    """Run a command of remoe-edge in the image, with the mounts that it needs on a Jetson.

    \b
    remoe-edge image run -- doctor
    remoe-edge image run --models /data/models --memory 6GiB --port 8080 -- \\
        serve /models/olmoe.gguf --host 0.0.0.0 --memory 6GiB

    Shows models, JetPack's release, power mode, sensors and jtop, where they are, and says on stderr what is missing.
    Ends with the exit status of the command.
    """
    found = find_engine(engine)
    options = RunOptions(tag, arguments, models, parse_size(memory) if memory else None, port, as_root)
    plan = plan_run(found, options, nvidia=has_nvidia(found), terminal=sys.stdin.isatty() and sys.stdout.isatty())
    for sentence in plan.missing:
        click.echo(f"Note: {sentence}", err=True)
    if dry_run:
        for each in (plan.prepare, plan.command, plan.clean):
            if each:
                click.echo(shlex.join(each))
        return
    check_image(found, tag)
    ctx.exit(run_container(plan))
