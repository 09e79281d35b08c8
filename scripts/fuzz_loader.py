"""libFuzzer and AddressSanitizer on the patched loader: ``.venv/bin/python scripts/fuzz_loader.py --seconds 600``.

Needs clang with its runtime (``apt install clang libclang-rt-dev`` of one version), cmake and ninja. The pinned source
is patched and built in ``build/fuzz-loader`` (about half an hour on one core); later runs go on from the corpus there.
Without clang, ``scripts/fuzz.py loader`` looks for the same, in the built runtime and without coverage.
"""

import os
import re
import subprocess
import sys
from pathlib import Path, PurePath

import click

from remoe_edge.runtime.patch import apply_patches
from remoe_edge.runtime.pin import load_pin, patches_dir
from remoe_edge.runtime.sdist import fetch_sdist, unpack

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,fuzzer-no-link"
OPTIONS = {
    **dict.fromkeys(("BUILD_SHARED_LIBS", "GGML_NATIVE", "GGML_OPENMP", "GGML_LLAMAFILE", "LLAMA_BUILD_COMMON"), "OFF"),
    **dict.fromkeys(("LLAMA_BUILD_TESTS", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER"), "OFF"),
    "CMAKE_C_FLAGS": FLAGS,
    "CMAKE_CXX_FLAGS": FLAGS,
}

sys.path.insert(0, str(ROOT / "tests"))


@click.command()
@click.option("--seconds", default=600, show_default=True, help="Time to fuzz.")
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "build" / "fuzz-loader", show_default=True)
@click.option("--jobs", default=1, show_default=True, help="Compilers at once.")
@click.option("--clang", default="clang", show_default=True, help="C compiler; the C++ one is named like it.")
def main(seconds: int, folder: Path, jobs: int, clang: str) -> None:
    """Build what is missing, then fuzz; exit with status 1 if memory was broken or a run did not end."""
    program = _build(folder.resolve(), jobs, clang)
    corpus, found = folder / "corpus", folder / "found"
    for each in corpus, found:
        each.mkdir(exist_ok=True)
    (corpus / "seed").write_bytes(seed(folder / "seed.gguf"))
    command = [str(program), str(corpus), "-fork=1", f"-max_total_time={seconds}", "-max_len=65536", "-timeout=30"]
    command += ["-rss_limit_mb=4000", "-detect_leaks=0", "-ignore_ooms=1", f"-artifact_prefix={found}/"]
    # Models that promise too much must fail to allocate, as they do without a sanitizer.
    options = "allocator_may_return_null=1:detect_leaks=0:max_allocation_size_mb=2000"
    done = subprocess.run(command, env={**os.environ, "ASAN_OPTIONS": options}, stderr=subprocess.PIPE, text=True)
    click.echo("\n".join(done.stderr.splitlines()[-15:]))
    left = [str(path) for path in sorted(found.iterdir()) if not path.name.startswith("oom-")]
    click.echo(f"{len(list(corpus.iterdir()))} inputs in the corpus, {len(left)} found{''.join(f' {x}' for x in left)}")
    sys.exit(bool(left))


def seed(path: Path) -> bytes:
    """The smallest model that runs: one layer, four experts, a vocabulary of eight words; 30 kB."""
    import gguf_maker as make
    import hostile
    from tiny_models import write_tiny_model

    write_tiny_model(path, hostile.ARCH, "Q4_0", n_expert=4, k=2, n_layer=1, hidden=64, ff=32)
    parts = hostile.take_apart(path)
    words, data = 8, b""
    for entry in sorted(parts.tensors, key=lambda entry: entry.offset):
        start, end = entry.offset, min((t.offset for t in parts.tensors if t.offset > entry.offset), default=None)
        content = parts.data[start:end]
        if entry.name in (b"token_embd.weight", b"output.weight"):
            entry.shape = (64, words)
            content = content[: 64 * words * 2]
        entry.offset = len(data)
        data += content + b"\0" * (-len(content) % 32)
    parts.data = data
    texts = b"".join(make.text(f"t{index}") for index in range(words))
    for key, kind, payload in (
        ("tokens", 8, texts),
        ("scores", 6, bytes(4 * words)),
        ("token_type", 5, b"\1\0\0\0" * words),
    ):
        parts.fields[f"tokenizer.ggml.{key}"] = make.array_field(f"tokenizer.ggml.{key}", kind, words, payload)
    parts.fields[f"{hostile.ARCH}.vocab_size"] = make.u32_field(f"{hostile.ARCH}.vocab_size", words)
    return parts.encode()


def _build(folder: Path, jobs: int, clang: str) -> Path:
    source, out, program = folder / "source", folder / "out", folder / "fuzz-loader"
    if not source.exists():
        partial = folder / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        unpack(fetch_sdist(load_pin(patches_dir())), partial, only=[PurePath("vendor/llama.cpp")])
        apply_patches(patches_dir(), partial / "vendor/llama.cpp")
        partial.rename(source)
    cxx = re.sub(r"clang(?!.*clang)", "clang++", clang)
    if not (out / "build.ninja").exists():
        defines = [f"-D{name}={value}" for name, value in OPTIONS.items()]
        compilers = [f"-DCMAKE_C_COMPILER={clang}", f"-DCMAKE_CXX_COMPILER={cxx}"]
        _run("cmake", "-G", "Ninja", "-S", source / "vendor/llama.cpp", "-B", out, *defines, *compilers)
    _run("ninja", "-C", out, f"-j{jobs}", "llama")
    tree = source / "vendor/llama.cpp"
    libraries = [
        *out.rglob("libllama.a"),
        *(p for n in ("ggml", "ggml-cpu", "ggml-base") for p in out.rglob(f"lib{n}.a")),
    ]
    flags = [
        "-std=c++17",
        "-O1",
        "-g1",
        "-fsanitize=address,fuzzer",
        f"-I{tree / 'include'}",
        f"-I{tree / 'ggml/include'}",
    ]
    target = ROOT / "tests/fuzz_loader.cpp"
    _run(
        cxx,
        *flags,
        target,
        "-Wl,--start-group",
        *libraries,
        "-Wl,--end-group",
        "-lpthread",
        "-ldl",
        "-lm",
        "-o",
        program,
    )
    return program


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    main()
