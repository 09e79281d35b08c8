"""Valgrind on loading and freeing a tiny model again and again: ``.venv/bin/python scripts/leak_check.py --cycles 20``.

Needs valgrind and what `remoe-edge build` needs. The pinned source is patched and built without this CPU's own
instructions (GGML_NATIVE=OFF: valgrind does not know all of them) and without OpenMP, whose threads never end, in the
cache of remoe-edge: minutes the first time, and again when the patches have changed; ccache helps. Each cycle of
tests/leak_check.cpp loads a model with the expert cache on (checksums, reading ahead, a hot set), decodes two tokens
and frees it.

Prints what is lost, definitely or indirectly, as one JSON object, and where on stderr. Exit status 1 if bytes are lost
in every cycle, or once in our own files; 77 if valgrind is missing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
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
from remoe_edge.runtime.patch import apply_patches
from remoe_edge.runtime.pin import load_pin, patches_digest, patches_dir
from remoe_edge.runtime.sdist import fetch_sdist, unpack
from remoe_edge.runtime.toolchain import default_jobs, find_compiler, find_tool

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tests/leak_check.cpp"
OPTIONS = (
    # As the runtime is built, so that ccache has what does not depend on the rest.
    *("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF"),
    *("LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_OPENSSL=OFF", "CMAKE_PLATFORM_NO_VERSIONED_SONAME=ON"),
    *("GGML_NATIVE=OFF", "GGML_OPENMP=OFF", "GGML_LLAMAFILE=OFF"),
)
OWN = re.compile(r"expert|\branking_")
"""In the names of our functions, and in few others."""
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
        "function (library)", the innermost first.
    """

    kind: str
    n_bytes: int
    blocks: int
    frames: tuple[str, ...]

    @property
    def ours(self) -> bool:
        return any(OWN.search(frame) for frame in self.frames)


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
        yield Loss(
            kind,
            int(what.findtext("leakedbytes", "0")),
            int(what.findtext("leakedblocks", "0")),
            tuple(
                f"{frame.findtext('fn', frame.findtext('ip', '?'))} ({Path(frame.findtext('obj', '?')).name})"
                for frame in error.iter("frame")
            ),
        )


def judge(losses: list[Loss], cycles: int) -> tuple[dict[str, Any], list[Loss]]:
    """Sums, and the losses that are faults: of every cycle, or of our own functions however often."""
    lost = [each for each in losses if each.kind != "possible"]
    faults = [each for each in lost if each.blocks >= cycles or each.ours]
    sums = {
        **{f"{kind}_bytes": sum(each.n_bytes for each in losses if each.kind == kind) for kind in _LOST.values()},
        "own_bytes": sum(each.n_bytes for each in lost if each.ours),
        "bytes_per_cycle": sum(each.n_bytes for each in lost if each.blocks >= cycles) / cycles,
    }
    return sums, faults


@click.command()
@click.option("--cycles", default=1000, show_default=True, type=click.IntRange(min=2), help="Loads of the model.")
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers at once. [default: what CPUs and memory allow]")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build. [default: in the cache of remoe-edge]")
@click.option("--leak", is_flag=True, help="Lose 16 bytes in each cycle, to see that this is found.")
def main(cycles: int, jobs: int | None, folder: Path | None, leak: bool) -> None:
    """Load and free a tiny model again and again under valgrind."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        click.echo("valgrind is missing: apt install valgrind", err=True)
        sys.exit(_MISSING)
    try:
        folder = (folder or cache_dir() / "leak-check").resolve()
        program = build(folder, jobs or default_jobs())
        begin = time.monotonic()
        losses = run(valgrind, program, folder, cycles, leak)
    except RemoeError as error:
        raise click.ClickException(str(error)) from error
    except subprocess.CalledProcessError as error:
        raise click.ClickException(f"{Path(error.cmd[0]).name} failed with status {error.returncode}") from error
    sums, faults = judge(losses, cycles)
    for each in faults:
        click.echo(f"{each.n_bytes} bytes in {each.blocks} blocks are lost ({each.kind}):", err=True)
        click.echo("".join(f"    {frame}\n" for frame in each.frames[:20]), err=True, nl=False)
    result = {"ok": not faults, "cycles": cycles, "seconds": round(time.monotonic() - begin), **sums}
    click.echo(json.dumps(result))
    sys.exit(bool(faults))


def build(folder: Path, jobs: int) -> Path:
    """tests/leak_check.cpp on the patched libraries, which are built if they are missing or older than the patches."""
    pin, tree, out, state = load_pin(patches_dir()), folder / "llama.cpp", folder / "out", folder / "patches"
    compiler, cmake, ninja = find_compiler(cuda=False), find_tool("cmake"), find_tool("ninja")
    wanted = f"{pin.version} {patches_digest(patches_dir())}"
    if not state.exists() or state.read_text() != wanted:
        shutil.rmtree(tree, ignore_errors=True)
        unpack(fetch_sdist(pin), folder / "sdist", only=[PurePath("vendor/llama.cpp")])
        (folder / "sdist/vendor/llama.cpp").rename(tree)
        shutil.rmtree(folder / "sdist")
        # It leads nowhere.
        (tree / ".git").unlink(missing_ok=True)
        apply_patches(patches_dir(), tree)
        state.write_text(wanted)
    environment = {
        **os.environ,
        **compiler.variables,
        "CCACHE_BASEDIR": str(folder),
        "CCACHE_NOHASHDIR": "1",
        "GIT_CEILING_DIRECTORIES": str(folder),
    }
    for command in (
        [
            cmake,
            "-S",
            tree,
            "-B",
            out,
            "-G",
            "Ninja",
            *(f"-D{each}" for each in (*OPTIONS, f"CMAKE_MAKE_PROGRAM={ninja}")),
        ],
        [ninja, "-C", out, f"-j{jobs}", "llama"],
    ):
        # What they say is no result.
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    program, libraries = folder / "leak-check", out / "bin"
    includes = [f"-I{tree / name}" for name in ("include", "ggml/include")]
    links = [f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    subprocess.run(
        [*shlex.split(compiler.variables["CXX"]), "-std=c++17", "-O1", "-g", *includes, PROGRAM, *links, "-o", program],
        check=True,
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
    # Its one line is no result.
    subprocess.run([*command, program, model, str(cycles), *(["leak"] if leak else [])], check=True, stdout=sys.stderr)
    return list(read_losses(report.read_text(errors="replace")))


if __name__ == "__main__":
    main()
