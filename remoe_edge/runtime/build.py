"""Builds the runtime: patched llama.cpp compiled once into a cache, and a llama-cpp-python that uses exactly it.

A cached runtime is a folder ``<cache>/runtime/<key>`` with ``lib/``, ``bin/``, ``wheel/``, ``LICENSES/`` and
``manifest.json``. It holds every library once, under one name, and may be moved.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.files import cache_dir
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.patch import apply_patches
from remoe_edge.runtime.pin import Pin, load_pin, patches_digest, patches_dir
from remoe_edge.runtime.sdist import fetch_sdist, unpack
from remoe_edge.runtime.toolchain import Compiler, cross_target, default_jobs, find_compiler, find_tool
from remoe_edge.runtime.wheel import Manifest, install_wheel, installed_manifest, write_wheel

_FLAGS = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=ON",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    # Nothing is fetched while compiling, and nothing is served over TLS.
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
    "LLAMA_OPENSSL=OFF",
    # One file per library, named as others need it: wheels hold no symbolic links, and a copy under a second name
    # would be loaded as a second ggml.
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
    # The libraries beside a program come before any that LD_LIBRARY_PATH names.
    "CMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "CMAKE_INSTALL_RPATH=$ORIGIN;$ORIGIN/../lib",
)
_LINKER_FLAGS = "-Wl,--disable-new-dtags"
_TARGETS = (
    "llama",
    "mtmd",
    "llama-bench",
    "llama-cli",
    "llama-completion",
    "llama-fit-params",
    "llama-gguf-split",
    "llama-perplexity",
    "llama-quantize",
    "llama-server",
)
_TEST_TARGET = re.compile(r"^(test-expert[\w-]*): phony$", re.MULTILINE)
_WHEEL_LIBRARIES = ("libllama.so", "libmtmd.so", "libggml*.so")
_NINJA_STATUS = re.compile(r"\[(\d+)/(\d+)\] ")
_LAYOUT = 1
"""Part of every key; raise it when the same inputs come to make a different folder."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build, and how.

    Attributes
    ----------
    cuda
        Build the CUDA backend as well.
    source
        A llama.cpp checkout to build, copied and left as it is; by default the pinned llama.cpp.
    jobs
        Compilations at once; by default what CPUs and memory allow.
    clean
        Delete every cached runtime and half-done build first.
    patches
        The folder with ``pin.json`` and the patches.
    compiler
        Compilers for another machine; what they make is not installed here. By default this machine's.
    """

    cuda: bool = False
    source: Path | None = None
    jobs: int | None = None
    clean: bool = False
    patches: Path | None = None
    compiler: Compiler | None = None


@dataclass(frozen=True)
class Runtime:
    """A built runtime in the cache."""

    root: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def lib_dir(self) -> Path:
        return self.root / "lib"

    @property
    def bin_dir(self) -> Path:
        return self.root / "bin"

    @property
    def wheel(self) -> Path:
        (wheel,) = (self.root / "wheel").iterdir()
        return wheel


def ensure_runtime(options: BuildOptions | None = None, report: Report = silent) -> Runtime:
    """The runtime, in the cache and installed in this environment; built where missing.

    Without options an installed runtime of the current pin and patches is kept, be it with CUDA or from a checkout.
    Raises RemoeError if a tool is missing, a patch does not fit, or llama.cpp does not compile.
    """
    if options is None and (kept := _current_runtime()) is not None:
        return kept
    options = options or BuildOptions()
    patches = options.patches or patches_dir()
    pin = load_pin(patches)
    compiler = options.compiler or find_compiler(cuda=options.cuda)
    manifest = _plan(options, patches, pin, compiler)
    with _lock(report):
        if options.clean:
            shutil.rmtree(_runtimes(), ignore_errors=True)
            shutil.rmtree(_builds(), ignore_errors=True)
        runtime = _find(manifest.key) or _build(options, patches, pin, compiler, manifest, report)
        if options.compiler is None and installed_manifest() != runtime.manifest:
            report("Installing llama-cpp-python", None)
            install_wheel(runtime.wheel)
    return runtime


def check_runtime(options: BuildOptions) -> list[str]:
    """How the runtime installed in this environment differs from what ``options`` would build; empty if it does not.

    Each difference is one line for people. Nothing is built, downloaded or changed.
    """
    installed = installed_manifest()
    if installed is None:
        return ["no runtime of remoe-edge is installed in this environment"]
    patches = options.patches or patches_dir()
    options = replace(options, cuda=options.cuda or installed.cuda)
    wanted = _plan(options, patches, load_pin(patches), find_compiler(cuda=options.cuda))
    differences = [
        f"{name}: installed {_brief(old)}, wanted {_brief(new)}"
        for (name, old), new in zip(asdict(installed).items(), asdict(wanted).values(), strict=True)
        if old != new and name != "key"
    ]
    if not differences and _find(installed.key) is None:
        differences.append(f"its tools are no longer in the cache ({_runtimes() / installed.key})")
    return differences


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def _runtimes() -> Path:
    return cache_dir() / "runtime"


def _builds() -> Path:
    return cache_dir() / "build"


def _find(key: str) -> Runtime | None:
    # A bundle or image carries its runtime where nothing is written.
    carried = os.environ.get("REMOE_EDGE_RUNTIMES")
    for folder in (_runtimes(), *([Path(carried)] if carried else [])):
        try:
            return Runtime(folder / key, Manifest.from_json((folder / key / "manifest.json").read_text()))
        except FileNotFoundError:
            continue
    return None


def _current_runtime() -> Runtime | None:
    installed = installed_manifest()
    if installed is None:
        return None
    patches = patches_dir()
    pin = load_pin(patches)
    if (installed.llama_cpp_python, installed.patches) != (pin.version, patches_digest(patches)):
        return None
    runtime = _find(installed.key)
    if runtime is None:
        return None
    if installed.target == cross_target(platform.machine()):
        return runtime
    try:
        target = find_compiler(cuda=False).target
    except RemoeError:
        # An image without a compiler: what it carries is all there is.
        return runtime
    return runtime if target == installed.target else None


def _plan(options: BuildOptions, patches: Path, pin: Pin, compiler: Compiler) -> Manifest:
    flags = [*_FLAGS]
    link = f"{compiler.settings.get('LDFLAGS', '')} {_LINKER_FLAGS}".strip()
    flags += [f"CMAKE_{kind}_LINKER_FLAGS={link}" for kind in ("EXE", "SHARED")]
    if options.cuda:
        flags.append("GGML_CUDA=ON")
        if architectures := compiler.settings.get("CUDAARCHS"):
            flags.append(f"CMAKE_CUDA_ARCHITECTURES={architectures}")
    flags += compiler.flags
    commit = pin.llama_cpp_commit if options.source is None else "checkout"
    flags += [f"LLAMA_BUILD_COMMIT={commit}", "LLAMA_BUILD_NUMBER=0"]
    manifest = Manifest(
        key="",
        llama_cpp_python=pin.version,
        llama_cpp=commit,
        source=pin.sha256 if options.source is None else _tree_digest(options.source),
        patches=patches_digest(patches),
        cuda=options.cuda,
        flags=flags,
        compiler=compiler.version,
        target=compiler.target,
        settings=compiler.settings,
    )
    identity = json.dumps([_LAYOUT, pin.sha256, asdict(manifest)], sort_keys=True)
    return replace(manifest, key=hashlib.sha256(identity.encode()).hexdigest()[:16])


@contextmanager
def _lock(report: Report) -> Iterator[None]:
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another remoe-edge that is building", None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    options: BuildOptions, patches: Path, pin: Pin, compiler: Compiler, manifest: Manifest, report: Report
) -> Runtime:
    # Named by the key and kept when interrupted, so that the next call goes on compiling where this one stopped.
    work = _builds() / manifest.key
    work.mkdir(parents=True, exist_ok=True)
    for other in set(_builds().iterdir()) - {work}:
        shutil.rmtree(other)
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    _prepare(options, patches, pin, manifest, work, report)
    _compile(cmake, ninja, options.jobs or default_jobs(), compiler, manifest, work, report)
    report("Packing", None)
    root = _publish(work, manifest, compiler.platform)
    shutil.rmtree(work)
    return Runtime(root, manifest)


def _prepare(options: BuildOptions, patches: Path, pin: Pin, manifest: Manifest, work: Path, report: Report) -> None:
    """Make ``work/sdist`` and the patched ``work/llama.cpp``, or leave them as an earlier call made them."""
    tree, sdist = work / "llama.cpp", work / "sdist"
    if tree.exists():
        return
    shutil.rmtree(work, ignore_errors=True)
    report(f"Fetching llama-cpp-python {pin.version}", None)
    archive = fetch_sdist(pin)
    report("Unpacking", None)
    unpack(archive, sdist)
    vendored, unpatched = sdist / "vendor" / "llama.cpp", work / "unpatched"
    if options.source is None:
        vendored.rename(unpatched)
    else:
        shutil.copytree(options.source, unpatched, symlinks=True, ignore=_ignore_builds(options.source))
    # The sdist leaves a submodule's pointer here that leads nowhere.
    (unpatched / ".git").unlink(missing_ok=True)
    apply_patches(patches, unpatched)
    if patches_digest(patches) != manifest.patches:
        raise RemoeError(f"{patches} changed while it was being applied; run this again")
    unpatched.rename(tree)


def _ignore_builds(top: Path) -> Callable[[str, list[str]], list[str]]:
    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == top and (name == ".git" or name.startswith("build"))]

    return ignored


def _tree_digest(source: Path) -> str:
    """SHA-256 over the names and contents of a checkout, without ``.git`` and ``build*`` at its top."""
    for name in ("CMakeLists.txt", "include/llama.h"):
        if not (source / name).is_file():
            raise RemoeError(f"{source} is not a llama.cpp checkout: it has no {name}")
    ignored = _ignore_builds(source)
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(set(folders) - set(ignored(folder, folders)))
        for name in sorted(set(names) - set(ignored(folder, names))):
            path = Path(folder, name)
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            digest.update(f"{path.relative_to(source).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _compile(
    cmake: Path, ninja: Path, jobs: int, compiler: Compiler, manifest: Manifest, work: Path, report: Report
) -> None:
    out = work / "out"
    environment = {
        **os.environ,
        **compiler.variables,
        "NINJA_STATUS": "[%f/%t] ",
        # ccache: the same file in another build's folder is the same file.
        "CCACHE_BASEDIR": str(work),
        "CCACHE_NOHASHDIR": "1",
        # llama.cpp asks git for its version; the answer must not come from a repository around the cache.
        "GIT_CEILING_DIRECTORIES": str(work),
    }
    report("Configuring llama.cpp", None)
    configure: list[Path | str] = [cmake, "-S", work / "llama.cpp", "-B", out, "-G", "Ninja"]
    configure += [f"-D{flag}" for flag in (f"CMAKE_MAKE_PROGRAM={ninja}", *compiler.places, *manifest.flags)]
    _run(configure, environment, work / "configure.log")
    listing = subprocess.run([ninja, "-C", out, "-t", "targets", "all"], capture_output=True, text=True, check=True)
    targets = [*_TARGETS, *_TEST_TARGET.findall(listing.stdout)]
    _run([ninja, "-C", out, f"-j{jobs}", *targets], environment, work / "compile.log", report)


def _run(command: Sequence[Path | str], environment: dict[str, str], log: Path, report: Report = silent) -> None:
    """Run a tool with its output in ``log``, following ninja's counter; raise RemoeError with the reason it fails."""
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                output.write(line)
                if status := _NINJA_STATUS.match(line):
                    report("Compiling llama.cpp", int(status[1]) / int(status[2]))
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        text = log.read_text()
        at = max(0, text.find("FAILED:"), text.find("CMake Error"))
        reason = "\n".join(text[at:].splitlines()[:30])
        hint = "\nThe machine ran out of memory; try --jobs 1" if "Killed signal" in text else ""
        raise RemoeError(f"{Path(command[0]).name} failed; all of its output is in {log}\n{reason}{hint}")


def _publish(work: Path, manifest: Manifest, target: str | None) -> Path:
    """Put together the runtime folder and move it to its place in one step."""
    new, root = work / "runtime", _runtimes() / manifest.key
    shutil.rmtree(new, ignore_errors=True)
    for name in ("lib", "bin", "wheel", "LICENSES"):
        (new / name).mkdir(parents=True)
    for path in sorted((work / "out" / "bin").iterdir()):
        shutil.copy2(path, new / ("lib" if path.suffix == ".so" else "bin") / path.name)
    libraries = [path for pattern in _WHEEL_LIBRARIES for path in (new / "lib").glob(pattern)]
    write_wheel(work / "sdist", libraries, manifest, new / "wheel", target)
    shutil.copy2(work / "sdist" / "LICENSE.md", new / "LICENSES" / "llama-cpp-python")
    shutil.copy2(work / "llama.cpp" / "LICENSE", new / "LICENSES" / "llama.cpp")
    for path in (work / "llama.cpp" / "licenses").glob("LICENSE-*"):
        shutil.copy2(path, new / "LICENSES" / path.name.removeprefix("LICENSE-"))
    (new / "manifest.json").write_text(manifest.to_json())
    # What the rename makes visible must survive a power cut.
    os.sync()
    root.parent.mkdir(exist_ok=True)
    new.rename(root)
    return root
