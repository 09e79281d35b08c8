"""Proves the Jetson build as far as that goes without a Jetson: cross-built for aarch64, run under qemu.

    python scripts/check_jetson.py [--work DIR] [--jobs N] [--only STEP ...]

Steps: compile (cross-compile without CUDA, check the files), native (its own tests and the demo model with and without
the cache, under qemu without any image), bundle (the tarball), image (the recipe with buildah, on a Debian 12 base for
arm64 in place of NVIDIA's), and inside that image, under qemu: doctor, decode (the demo model), exact (cache against no
cache, logits by memcmp, every architecture and type), trace (the OLMoE trace's counters against the simulator), bench
(JSONL rows).

The first three need g++-aarch64-linux-gnu and qemu-user-static; the image root, binfmt-support, buildah and mmdebstrap,
too. What is missing is said, and the exit status is then 77, as test harnesses take it. Nothing outside --work is
written, but for the cache folder and ccache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from remoe_edge.demo_model import demo_gguf
from remoe_edge.files import cache_dir
from remoe_edge.jetson.check import artefacts, check
from remoe_edge.jetson.cross import cross_compiler
from remoe_edge.jetson.pins import jetpack
from remoe_edge.runtime.build import BuildOptions, ensure_runtime

ROOT = Path(__file__).resolve().parents[1]
SUITE = "bookworm"
ARCHIVE = "http://deb.debian.org/debian"
PYTHON = "3.11"
TAG = "localhost/remoe-edge:check"
COMPILING = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64-static": "qemu-user-static"}
IMAGE = {"buildah": "buildah", "mmdebstrap": "mmdebstrap"}
WITHOUT_IMAGE = ("compile", "native", "bundle")
STEPS = (*WITHOUT_IMAGE, "image", "doctor", "decode", "exact", "trace", "bench")
# They start threads by the thousand, of which qemu gives no memory back: 24 GB.
TOO_LARGE = ("test-expert-cache", "test-expert-faults")
# The cross compiler's own C library, for programs that run outside the image.
SYSROOT = "/usr/aarch64-linux-gnu"
# Pure Python, so they run on the image's Python; there is no need for them in the image.
TEST_PACKAGES = ("pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pytest_timeout.py")
SKIPPED = 77


def missing(steps: Sequence[str]) -> str | None:
    with_image = bool(set(steps) - set(WITHOUT_IMAGE))
    tools = COMPILING | (IMAGE if with_image else {})
    packages = [package for program, package in tools.items() if shutil.which(program) is None]
    if platform.machine() != "x86_64":
        return f"a cross-build is made on x86-64, this machine is {platform.machine()}"
    if packages:
        return f"apt packages are missing: {' '.join(packages)}"
    if not with_image:
        return None
    if os.geteuid() != 0:
        return "making and running an arm64 image needs root"
    if not Path("/proc/sys/fs/binfmt_misc/qemu-aarch64").exists():
        return (
            "aarch64 programs do not run here: mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc && "
            "update-binfmts --enable qemu-aarch64"
        )
    return None


def run(
    command: list[str], folder: str | None = None, quiet: bool = False, more: Mapping[str, str] | None = None
) -> str:
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(more or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
    )
    if result.returncode != 0:
        sys.stdout.write(result.stdout + (result.stderr or ""))
        sys.exit(f"failed ({result.returncode}): {' '.join(command)}")
    return result.stdout


class Check:
    def __init__(self, work: Path, jobs: int | None) -> None:
        self.work = work
        self.jobs = jobs
        self.tarball = work / "bundle.tar.gz"
        storage = work / "storage.conf"
        storage.write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{work}/images/root"\nrunroot = "{work}/images/run"\n'
        )
        self.environment = {"CONTAINERS_STORAGE_CONF": str(storage)}

    def buildah(self, *arguments: str) -> str:
        return run(["buildah", *arguments], more=self.environment)

    def remoe(self, *arguments: str) -> str:
        return run([sys.executable, "-m", "remoe_edge", *arguments], more=self.environment)

    def compile(self) -> str:
        runtime = ensure_runtime(BuildOptions(jobs=self.jobs, compiler=cross_compiler()))
        found = artefacts(runtime.root)
        problems = [problem for name in ("6", "7") for problem in check(found, jetpack(name))]
        if problems:
            sys.exit("\n".join(problems))
        return f"{len(found)} files will load on Ubuntu 22.04 and 24.04"

    def native(self) -> str:
        runtime = ensure_runtime(BuildOptions(jobs=self.jobs, compiler=cross_compiler()))
        emulated = ["qemu-aarch64-static", "-L", SYSROOT]
        programs = [path for path in sorted(runtime.bin_dir.glob("test-expert*")) if path.name not in TOO_LARGE]
        for program in programs:
            vectors = [str(ROOT / "tests/data/policy_victims.txt")] if program.name == "test-expert-policy" else []
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                run([*emulated, str(program), *vectors], folder)
        texts = {}
        for budget in ("off", "4s", "8s"):
            # No repacking, so that all have the same kernels.
            command = [*emulated, str(runtime.bin_dir / "llama-completion"), "-m", str(demo_gguf()), "-t", "1"]
            command += ["-p", "Once upon a time", "-n", "16", "--temp", "0", "-no-cnv", "--no-repack"]
            command += ["--expert-cache", budget]
            # Patched or not, one run in twenty ends before its last line is written.
            texts[budget] = next((text for _ in range(5) if (text := run(command, quiet=True)).endswith("\n")), "")
        assert len(texts["off"].split()) > 8, texts
        assert len(set(texts.values())) == 1, texts
        return f"{len(programs)} test programs passed; equal text without the cache, with 4 and 8 slots"

    def bundle(self) -> str:
        options = ["--target", "jetson", "--no-cuda", "--python", PYTHON, "-o", str(self.tarball), "--force", "--json"]
        made = json.loads(self.remoe("build", *options, *(["--jobs", str(self.jobs)] if self.jobs else [])))
        return f"{made['bytes'] / 1e6:.1f} MB"

    def image(self) -> str:
        bases = {}
        for architecture in ("amd64", "arm64"):
            bases[architecture] = f"localhost/debian-{architecture}:{SUITE}"
            if bases[architecture] not in self.buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
                self.base(architecture, bases[architecture])
        made = json.loads(
            self.remoe(
                *("image", "build", "--jetpack", "7", "--engine", "buildah", "-t", TAG, "--no-cuda", "--json"),
                *("--python", PYTHON, "--tarball", str(self.tarball)),
                *("--build-image", bases["amd64"], "--runtime-image", bases["arm64"]),
                *("--sbom", str(self.work / "sbom.cdx.json"), "--force"),
            )
        )
        return f"{made['bytes'] / 1e6:.0f} MB, {made['components']} components in the SBOM"

    def base(self, architecture: str, tag: str) -> None:
        folder = self.work / f"base-{architecture}"
        folder.mkdir(exist_ok=True)
        if not (folder / "root.tar").exists():
            options = ["--variant=minbase", f"--arch={architecture}", "--mode=root"]
            run(["mmdebstrap", *options, SUITE, str(folder / "part.tar"), ARCHIVE])
            (folder / "part.tar").rename(folder / "root.tar")
        (folder / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
        self.buildah("bud", "--isolation", "chroot", "--arch", architecture, "-t", tag, str(folder))

    def inside(self, *command: str, volumes: tuple[str, ...] = (), environment: tuple[str, ...] = ()) -> str:
        name = f"check-{os.getpid()}"
        self.buildah("from", "--pull-never", "--name", name, TAG)
        try:
            mounts = [each for volume in volumes for each in ("-v", volume)]
            variables = [each for variable in environment for each in ("--env", variable)]
            return self.buildah("run", "--isolation", "chroot", *mounts, *variables, name, "--", *command)
        finally:
            self.buildah("rm", name)

    def doctor(self) -> str:
        # A virtual machine is not fit for benchmarks, which is what the exit status says.
        script = "remoe-edge doctor --no-storage --json; true"
        found = {each["topic"]: each for each in json.loads(self.inside("sh", "-c", script))["findings"]}
        assert found["device"]["values"]["architecture"] == "aarch64", found["device"]
        assert found["runtime"]["level"] == "ok", found["runtime"]
        return str(found["runtime"]["found"])

    def decode(self) -> str:
        prompt = "Once upon a time"
        text = self.inside("remoe-edge", "run", "demo", "-p", prompt, "-n", "16", "--expert-cache", "8s", "-t", "1")
        assert len(text.split()) > 4, text
        return repr(text.strip())

    def pytest(self, *arguments: str, environment: tuple[str, ...] = ()) -> str:
        packages = self.work / "test-packages"
        shutil.rmtree(packages, ignore_errors=True)
        packages.mkdir()
        for name in TEST_PACKAGES:
            spec = importlib.util.find_spec(name.removesuffix(".py"))
            assert spec is not None
            assert spec.origin is not None
            if name.endswith(".py"):
                shutil.copy2(spec.origin, packages)
            else:
                shutil.copytree(Path(spec.origin).parent, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
        tests = self.work / "tests"
        shutil.rmtree(tests, ignore_errors=True)
        shutil.copytree(ROOT / "tests", tests / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "pyproject.toml", tests)
        site = "/opt/remoe-edge/site:/opt/test-packages"
        options = (
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "pytest_timeout",
            "-p",
            "no:warnings",
            "-o",
            "filterwarnings=default",
            "--timeout=1800",
        )
        output = self.inside(
            *(f"python{PYTHON}", "-B", "-m", "pytest", *options, "-rs", *arguments),
            volumes=(f"{packages}:/opt/test-packages:ro", f"{tests}:/opt/tests:ro"),
            environment=(f"PYTHONPATH={site}", "REMOE_EDGE_RUNTIMES=/opt/remoe-edge/runtime", *environment),
        )
        return output.strip().splitlines()[-1]

    def exact(self) -> str:
        # Every architecture and every type: ten models of a minute and a half. All 25, not shortened, are two hours.
        models = "Q4_0 or olmoe"
        return self.pytest(
            "/opt/tests/tests/test_runtime_exact.py", "-k", models, environment=("REMOE_SHORT_MATRIX=1",)
        )

    def trace(self) -> str:
        return self.pytest("/opt/tests/tests/test_runtime_twin.py", "-k", "counters and lru-16 and direct")

    def bench(self) -> str:
        options = ("--budget", "8s", "--baseline", "resident", "-n", "8", "-r", "1", "-t", "1", "--cool-down", "0")
        lines = self.inside("remoe-edge", "bench", "demo", "-p", "Once upon a time", *options).splitlines()
        (self.work / "results.jsonl").write_text("\n".join(lines) + "\n")
        rows = [json.loads(line) for line in lines]
        cache, resident = rows
        assert {cache["status"], resident["status"]} == {"ok"}, rows
        assert cache["output_sha256"] == resident["output_sha256"], "the cache changed the output"
        return f"{len(rows)} rows; TPOT {cache['tpot_ms']:.0f} ms (emulated), {cache['hit_rate']:.1%} hits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=cache_dir() / "check-jetson")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    options = parser.parse_args()
    if reason := missing(options.only):
        print(f"skipped: {reason}")
        return SKIPPED
    options.work.mkdir(parents=True, exist_ok=True)
    checks = Check(options.work.resolve(), options.jobs)
    for name in STEPS:
        if name in options.only:
            step: Callable[[], str] = getattr(checks, name)
            began = time.monotonic()
            found = step()
            print(f"{name}: {found} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
