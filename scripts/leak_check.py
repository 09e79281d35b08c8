"""Valgrind on loading and freeing a tiny model again and again: ``.venv/bin/python scripts/leak_check.py --cycles 20``.

Needs valgrind, a C++ compiler, cmake and ninja. The pinned source is patched and built without this CPU's own
instructions (GGML_NATIVE=OFF: valgrind does not know all of them) in the cache of remoe-edge: minutes the first time,
and again when the patches have changed; ccache helps. Each cycle of tests/leak_check.cpp loads a model with the expert
cache on (checksums, reading ahead, a hot set), decodes two tokens and frees it.

Prints what is lost, definitely or indirectly, as one JSON object, and where on stderr. Exit status 1 if bytes are lost
in every cycle, or once in our own files; 77 if valgrind is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import click

from remoe_edge.errors import RemoeError
from remoe_edge.files import cache_dir
from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.patch import apply_patches
from remoe_edge.runtime.pin import load_pin, patches_digest, patches_dir
from remoe_edge.runtime.sdist import fetch_sdist, unpack
from remoe_edge.runtime.toolchain import find_tool

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tests/leak_check.cpp"
FLAGS = "-O1 -g1 -fno-omit-frame-pointer"
OPTIONS = {
    # OpenMP keeps its threads, ggml's own pool ends with its context.
    **dict.fromkeys(("BUILD_SHARED_LIBS", "GGML_NATIVE", "GGML_OPENMP", "GGML_LLAMAFILE", "LLAMA_BUILD_COMMON"), "OFF"),
    **dict.fromkeys(("LLAMA_BUILD_TESTS", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER"), "OFF"),
    "CMAKE_C_FLAGS": FLAGS,
    "CMAKE_CXX_FLAGS": FLAGS,
}
_FRAMES = 60
_MISSING = 77
_LOST = {"Leak_DefinitelyLost": "definite", "Leak_IndirectlyLost": "indirect", "Leak_PossiblyLost": "possible"}


@dataclass(frozen=True)
class Loss:
    """Blocks that were allocated at one place and are lost at the end.

    Attributes
    ----------
    kind
        "definite", "indirect" (held by something lost) or "possible" (something points into it: a thread's stack).
    frames
        "function (file:line)", the innermost first.
    files
        The frames' source files, without folders.
    """

    kind: str
    n_bytes: int
    blocks: int
    frames: tuple[str, ...]
    files: frozenset[str]


def read_losses(text: str) -> Iterator[Loss]:
    """What a file of ``valgrind --xml=yes --leak-check=full`` says. Raises RemoeError if it is cut off."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise RemoeError(f"valgrind did not end: its report is cut off ({error})") from error
    for error in root.iter("error"):
        kind = _LOST.get(error.findtext("kind", ""))
        what = error.find("xwhat")
        if kind is None or what is None:
            continue
        frames = list(error.iter("frame"))
        yield Loss(
            kind,
            int(what.findtext("leakedbytes", "0")),
            int(what.findtext("leakedblocks", "0")),
            tuple(
                f"{each.findtext('fn', each.findtext('ip', '?'))} "
                f"({each.findtext('file', each.findtext('obj', '?'))}:{each.findtext('line', '?')})"
                for each in frames
            ),
            frozenset(each.findtext("file", "") for each in frames),
        )


def own_files() -> frozenset[str]:
    """Names of our sources in llama.cpp."""
    return frozenset(path.name for path in (patches_dir() / "sources").rglob("*.[ch]*"))


def judge(losses: list[Loss], cycles: int, own: frozenset[str]) -> tuple[dict[str, Any], list[Loss]]:
    """Sums, and the losses that are faults: of every cycle, or of our own files however often."""
    lost = [each for each in losses if each.kind != "possible"]
    ours = [each for each in lost if each.files & own]
    faults = [each for each in lost if each.blocks >= cycles or each in ours]
    sums = {
        **{f"{kind}_bytes": sum(each.n_bytes for each in losses if each.kind == kind) for kind in _LOST.values()},
        "own_bytes": sum(each.n_bytes for each in ours),
        "bytes_per_cycle": sum(each.n_bytes for each in lost if each.blocks >= cycles) / cycles,
    }
    return sums, faults


@click.command()
@click.option("--cycles", default=1000, show_default=True, type=click.IntRange(min=2), help="Loads of the model.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Compilers at once.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Sources and build. [default: in the cache of remoe-edge]"
)
@click.option("--leak", is_flag=True, help="Lose 16 bytes in each cycle, to see that this is found.")
def main(cycles: int, jobs: int, folder: Path | None, leak: bool) -> None:
    """Load and free a tiny model again and again under valgrind."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        click.echo("valgrind is missing: apt install valgrind", err=True)
        sys.exit(_MISSING)
    try:
        folder = (folder or cache_dir() / "leak-check").resolve()
        program = build(folder, jobs)
        begin = time.monotonic()
        losses = run(valgrind, program, folder, cycles, leak)
    except RemoeError as error:
        raise click.ClickException(str(error)) from error
    except subprocess.CalledProcessError as error:
        raise click.ClickException(f"{Path(error.cmd[0]).name} failed with status {error.returncode}") from error
    sums, faults = judge(losses, cycles, own_files())
    for each in faults:
        click.echo(f"{each.n_bytes} bytes in {each.blocks} blocks are lost ({each.kind}):", err=True)
        click.echo("".join(f"    {frame}\n" for frame in each.frames[:20]), err=True, nl=False)
    result = {"ok": not faults, "cycles": cycles, "seconds": round(time.monotonic() - begin), **sums}
    click.echo(json.dumps(result))
    sys.exit(bool(faults))


def build(folder: Path, jobs: int) -> Path:
    """The program, built if patches or it have changed."""
    pin = load_pin(patches_dir())
    wanted = f"{pin.version} {patches_digest(patches_dir())}"
    source, out, program, state = (folder / name for name in ("source", "out", "leak-check", "patches"))
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if not state.exists() or state.read_text() != wanted:
        shutil.rmtree(source, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with stderr_progress() as report:
            report("unpacking", None)
            unpack(fetch_sdist(pin), source, only=[PurePath("vendor/llama.cpp")])
            (source / "vendor/llama.cpp/.git").unlink(missing_ok=True)
            apply_patches(patches_dir(), source / "vendor/llama.cpp")
        state.write_text(wanted)
    tree = source / "vendor/llama.cpp"
    defines = [f"-D{name}={value}" for name, value in {**OPTIONS, "CMAKE_MAKE_PROGRAM": ninja}.items()]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder)}
    for command in (
        [cmake, "-G", "Ninja", "-S", tree, "-B", out, *defines],
        [ninja, "-C", out, f"-j{jobs}", "llama"],
    ):
        # Its own lines are no result: they go where progress goes.
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    libraries = [path for name in ("llama", "ggml", "ggml-cpu", "ggml-base") for path in out.rglob(f"lib{name}.a")]
    includes = [f"-I{tree / name}" for name in ("include", "ggml/include")]
    grouped = ["-Wl,--start-group", *libraries, "-Wl,--end-group", "-lpthread", "-ldl", "-lm"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++17", *FLAGS.split(), *includes, PROGRAM, *grouped, "-o", program], check=True, cwd=folder
    )
    return program


def run(valgrind: str, program: Path, folder: Path, cycles: int, leak: bool) -> list[Loss]:
    """Valgrind's losses after so many cycles."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import write_tiny_model

    model = write_tiny_model(folder / "tiny.gguf", "qwen3moe", "Q4_0", n_expert=8, k=2, n_layer=2, hidden=64, ff=64)
    report = folder / "report.xml"
    command = [valgrind, "--leak-check=full", "--show-leak-kinds=definite,indirect,possible", "--xml=yes"]
    command += [f"--xml-file={report}", f"--num-callers={_FRAMES}", "--error-limit=no"]
    subprocess.run([*command, program, model, str(cycles), *(["leak"] if leak else [])], check=True)
    return list(read_losses(report.read_text(errors="replace")))


if __name__ == "__main__":
    main()
