"""`remoe-edge deploy`: to a Jetson over SSH, and results back."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import click

from remoe_edge.commands.bench import print_table
from remoe_edge.deploy.deploy import Deployment, deploy
from remoe_edge.deploy.ssh import Host
from remoe_edge.device.doctor import OK
from remoe_edge.errors import RemoeError
from remoe_edge.jetson.container import check_image
from remoe_edge.jetson.engine import ENGINES, find_engine
from remoe_edge.progress import stderr_progress

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_DEMO = "demo"


@click.command("deploy")
@click.argument("host")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--tarball",
    metavar="FILE",
    type=_FILE,
    help="What remoe-edge build --target jetson made. [default: remoe-edge-jetpack*.tar.gz here]",
)
@click.option("--image", metavar="TAG", help="Bring this image instead; needs docker there.")
@click.option("--engine", type=click.Choice(ENGINES), help="Engine here that has the image.")
@click.option(
    "--folder",
    default="remoe-edge",
    show_default=True,
    help="Folder there, below the home folder if not absolute. Choose one on NVMe.",
)
@click.option("-p", "--port", type=click.IntRange(1, 65535), help="Port of SSH. [default: ssh's configuration]")
@click.option("-i", "--identity", metavar="FILE", type=_FILE, help="Private key. [default: ssh's configuration]")
@click.option("-F", "--ssh-config", metavar="FILE", type=_FILE, help="Configuration of ssh.")
@click.option(
    "--bench",
    "bench_arguments",
    metavar="ARGS",
    default="--budget auto -n 32 -r 1",
    show_default=True,
    help="Arguments of the benchmark there.",
)
@click.option("--no-bench", is_flag=True, help="Only doctor, no benchmark.")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for what comes back. [default: remoe-HOST]",
)
@click.option("--force", is_flag=True, help="Overwrite existing results in --output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    host: str,
    model: Path,
    tarball: Path | None,
    image: str | None,
    engine: str | None,
    folder: str,
    port: int | None,
    identity: Path | None,
    ssh_config: Path | None,
    bench_arguments: str,
    no_bench: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Bring remoe-edge and a MODEL to HOST over SSH, run doctor and a short benchmark there, fetch the results.

    \b
    remoe-edge build --target jetson --jetpack 7
    remoe-edge deploy user@orin.local olmoe-q4_k_m.gguf --folder /data/remoe-edge

    HOST is what ssh takes; log in with a key. MODEL is a GGUF (all files of a split one are brought) or the word demo.
    What is there already is not copied again, and an interrupted copy goes on. Nothing is compiled there, and nothing
    is written outside --folder.

    Exit status: 0 if the benchmark gave rows; whether they are valid is what doctor says.
    """
    if tarball is not None and image is not None:
        raise click.UsageError("--tarball and --image exclude each other.")
    if engine is not None and image is None:
        raise click.UsageError("--engine has no effect without --image.")
    if no_bench and ctx.get_parameter_source("bench_arguments") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--bench has no effect with --no-bench.")
    if force and output is None:
        raise click.UsageError("--force has no effect without --output.")
    found = find_engine(engine) if image is not None else None
    if found is not None and image is not None:
        check_image(found, image, "aarch64")
    if str(model) != _DEMO and not model.is_file():
        raise click.UsageError(f"MODEL {model} is not a file.")
    deployment = Deployment(
        host=Host(host, port, identity, ssh_config),
        model=None if str(model) == _DEMO else model,
        output=output or Path("remoe-" + re.sub(r"[^A-Za-z0-9._-]", "-", host)),
        tarball=(tarball or _tarball_here()) if image is None else None,
        image=image,
        engine=found,
        folder=folder,
        bench=() if no_bench else tuple(shlex.split(bench_arguments)),
        force=force,
    )
    with stderr_progress() as report:
        outcome = deploy(deployment, report)
    if as_json:
        click.echo(json.dumps(asdict(outcome)))
        return
    for finding in outcome.findings:
        if finding["level"] != OK:
            advice = f" → {finding['advice']}" if finding["advice"] else ""
            click.echo(f"{finding['level']}: {finding['topic']}: {finding['found']}{advice}", err=True)
    if outcome.rows:
        print_table(outcome.rows, [])
    if not outcome.valid:
        click.echo("Doctor found problems: figures from there would not be valid before they are solved.", err=True)
    for file in outcome.files:
        click.echo(file)


def _tarball_here() -> Path:
    found = sorted(Path().glob("remoe-edge-jetpack*.tar.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RemoeError(
            "no remoe-edge-jetpack*.tar.gz here; make it: remoe-edge build --target jetson, or name a --tarball or an "
            "--image"
        )
    return found[-1]
