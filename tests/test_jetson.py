"""Building for a Jetson elsewhere: pins, what compiled files need, packages, cross-compiling. Images: test_image.py."""

import importlib.metadata
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_build import Scratch

from remoe_edge import __version__
from remoe_edge.cli import cli
from remoe_edge.errors import RemoeError
from remoe_edge.jetson.artefacts import machine_of, numbers, read_artefact
from remoe_edge.jetson.build import JetsonOptions, build_bundle
from remoe_edge.jetson.bundle import read_bundle
from remoe_edge.jetson.check import artefacts, check
from remoe_edge.jetson.cross import cross_compiler
from remoe_edge.jetson.package import write_package
from remoe_edge.jetson.pins import cuda_wheels, jetpack, jetpack_of, python_wheels, recipes_dir
from remoe_edge.jetson.sbom import add_packages
from remoe_edge.jetson.wheels import fetch_wheels
from remoe_edge.runtime.toolchain import find_compiler

ROOT = Path(__file__).resolve().parents[1]
CROSS = pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None,
    reason="no cross compiler to build for a Jetson with (apt: g++-aarch64-linux-gnu)",
)

# As nvcc 13.2 lays its code out: a container, then entries whose length, kind and architecture lie at these places.
FATBIN = """
asm(R"(
.section .nv_fatbin,"a",@progbits
.long 0xBA55ED50
.short 1, 16
.quad {size}
{entries}
.previous
)");
"""
ENTRY = ".short {kind}, 0x101\n.long 64\n.quad 8\n.long 0, 0, 0\n.long {arch}\n.zero 32\n.quad 0\n"


def compile_c(source: str, path: Path, *options: str) -> Path:
    command = find_compiler(cuda=False).variables["CC"].split()
    subprocess.run(
        [*command, "-shared", "-fPIC", "-x", "c", "-", "-o", path, *options], input=source, text=True, check=True
    )
    return path


def needing(folder: Path, version: str) -> Path:
    """A library that needs a symbol version of another."""
    (folder / "map").write_text(f"{version} {{ global: old; }};\n")
    compile_c("int old(void) { return 1; }", folder / "libother.so", f"-Wl,--version-script={folder}/map")
    return compile_c("int old(void); int new(void) { return old(); }", folder / "lib.so", f"-L{folder}", "-lother")


@pytest.mark.parametrize(("name", "ubuntu"), [("6", "22.04"), ("6.2.1", "22.04"), ("7", "24.04"), ("7.2.2", "24.04")])
def test_supported_jetpacks(name: str, ubuntu: str) -> None:
    assert jetpack(name).ubuntu == ubuntu


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "5",
            "JetPack 5 is not supported: its CUDA 11.4 and Python 3.8 are too old for the runtime; supported are",
        ),
        ("7.1", "JetPack 7.1 is not supported: it is for Thor only; on an Orin take 7.2 or newer"),
        ("8", "JetPack 8 is not supported: it is not known; supported are 6 and 7"),
        ("nonsense", "JetPack nonsense is not supported: it is not known"),
    ],
)
def test_jetpack_not_supported(name: str, sentence: str) -> None:
    for arguments in (["image", "build", "--dry-run"], ["build", "--target", "jetson"]):
        result = CliRunner().invoke(cli, [*arguments, "--jetpack", name])
        assert isinstance(result.exception, RemoeError)
        assert str(result.exception).startswith(sentence)


def test_l4t() -> None:
    assert (jetpack_of("36.4.7").name, jetpack_of("39.2.1").name) == ("6", "7")
    for release in ("35.6.5", "38.4.0"):
        with pytest.raises(RemoeError, match=f"^L4T {release} is not supported"):
            jetpack_of(release)


def test_pins_are_whole() -> None:
    wheels = {wheel.name: wheel for wheel in python_wheels()}
    needed = importlib.metadata.requires("remoe-edge") or []
    wanted = {re.split(r"[<>=!~; ]", line)[0] for line in needed if "extra ==" not in line}
    assert wanted <= wheels.keys(), "run scripts/update_jetson_pins.py --python"
    # Compiled for three Pythons on two architectures.
    assert len(wheels["numpy"].sha256) == 6
    for wheel in [*wheels.values(), *cuda_wheels("host"), *cuda_wheels("target")]:
        assert wheel.sha256
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in wheel.sha256)
    assert {wheel.version for wheel in cuda_wheels("host")} == {"13.2.78"}


def test_wheel_that_is_not_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOE_EDGE_CACHE", str(tmp_path))
    (click,) = [wheel for wheel in python_wheels() if wheel.name == "click"]
    folder = tmp_path / "wheels" / "3.12-aarch64"
    folder.mkdir(parents=True)
    path = folder / f"click-{click.version}-py3-none-any.whl"
    path.write_bytes(b"something else")
    with pytest.raises(RemoeError, match=re.escape(f"{path} is not the pinned file")):
        fetch_wheels([click], "3.12", "aarch64")


def test_what_a_library_needs(tmp_path: Path) -> None:
    found = read_artefact(needing(tmp_path, "GLIBC_2.36"))
    assert found.machine == machine_of(Path(sys.executable).resolve())
    assert found.needed[0] == "libother.so"
    assert found.newest("GLIBC") == (2, 36)
    assert found.newest("GLIBCXX") is None
    assert numbers("2.4") < numbers("2.35")


def test_symbol_versions_are_checked(tmp_path: Path) -> None:
    """2.36 is newer than JetPack 6's 2.35 and older than JetPack 7's 2.39."""
    found = replace(read_artefact(needing(tmp_path, "GLIBC_2.36")), machine="aarch64")
    (problem,) = check([found], jetpack("6"))
    assert problem.endswith("lib.so: needs GLIBC_2.36, and Ubuntu 22.04 has 2.35: compile it on an older system")
    assert check([found], jetpack("7")) == []
    for prefix, version in ("GLIBCXX", "3.4.34"), ("CXXABI", "1.3.15"), ("GLIBC", "2.40"):
        newer = replace(found, versions={"x": frozenset({f"{prefix}_{version}"})})
        assert f"needs {prefix}_{version}" in check([newer], jetpack("7"))[0]


def test_machine_and_search_path_are_checked(tmp_path: Path) -> None:
    compile_c("", tmp_path / "a.so", "-Wl,-rpath,/home/me/build")
    (tmp_path / "notes.txt").write_text("no program")
    (found,) = artefacts(tmp_path)
    if found.machine != "aarch64":
        assert check([found], jetpack("7")) == [f"{tmp_path}/a.so: is for {found.machine}, not aarch64"]
    (problem,) = check([replace(found, machine="aarch64")], jetpack("7"))
    assert "looks for libraries in /home/me/build" in problem
    assert check([replace(found, machine="aarch64", search="$ORIGIN:$ORIGIN/../lib")], jetpack("7")) == []


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ([(2, 87)], None),
        ([(2, 87), (2, 87)], None),
        ([(2, 80)], "has GPU code for sm_80; an Orin is sm_87"),
        ([(2, 87), (2, 90)], "has GPU code for sm_90; an Orin is sm_87"),
        ([(2, 87), (1, 87)], "has PTX (compute_87), which the device would compile at start"),
        ([], "has no GPU code for sm_87"),
    ],
)
def test_gpu_code_is_checked(tmp_path: Path, code: list[tuple[int, int]], sentence: str | None) -> None:
    entries = "".join(ENTRY.format(kind=kind, arch=arch) for kind, arch in code)
    source = FATBIN.format(size=72 * len(code), entries=entries)
    found = replace(read_artefact(compile_c(source, tmp_path / "libggml-cuda.so")), machine="aarch64")
    assert found.cubins == {f"sm_{arch}" for kind, arch in code if kind == 2}
    problems = check([found], jetpack("7"))
    assert [problem.partition(": ")[2] for problem in problems] == ([] if sentence is None else [sentence])


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = compile_c("int x;", tmp_path / "a.so")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RemoeError, match=r"a\.so is damaged"):
        read_artefact(path)
    path.write_bytes(b"#!/bin/sh\n" * 10)
    with pytest.raises(RemoeError, match="is neither a program nor a library"):
        read_artefact(path)
    # The table of sections lies beyond the end.
    path.write_bytes(whole[:0x28] + struct.pack("<Q", 1 << 60) + whole[0x30:])
    with pytest.raises(RemoeError, match=r"a\.so is damaged"):
        read_artefact(path)


def test_script(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "check_artefacts.py")]
    empty = subprocess.run([*script, tmp_path], capture_output=True, text=True)
    assert (empty.returncode, "no programs or libraries" in empty.stderr) == (1, True)
    needing(tmp_path, "GLIBC_2.99")
    result = subprocess.run([*script, tmp_path, "--jetpack", "7"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "lib.so: " in result.stdout
    assert result.stderr.startswith("JetPack 7: ")


def test_own_wheel_is_whole(tmp_path: Path) -> None:
    wheel = write_package(tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        archive.extractall(site)
    assert not [name for name in names if "__pycache__" in name]
    assert f"remoe_edge-{__version__}.dist-info/METADATA" in names
    code = (
        "import remoe_edge; from remoe_edge.runtime.pin import *; from remoe_edge.jetson.pins import *; "
        "print(remoe_edge.__file__, patches_dir(), recipes_dir(), patches_digest(patches_dir()), jetpack('7').cuda)"
    )
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert all(place.startswith(str(site)) for place in out[:3])
    here = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.split()
    assert out[3:] == here[3:]


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b" + bytes(40)])
def test_file_that_is_no_bundle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(content)
    with pytest.raises(RemoeError, match=r"x\.tar\.gz is not a bundle of remoe-edge"):
        read_bundle(path)


def test_archive_that_is_no_bundle(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, "remoe-edge/something")
    with pytest.raises(RemoeError, match=r"is not a bundle of remoe-edge; make one with: remoe-edge build --target"):
        read_bundle(path)


def test_packages_of_the_distribution_join_the_sbom(tmp_path: Path) -> None:
    path = tmp_path / "sbom.json"
    path.write_text(json.dumps({"bomFormat": "CycloneDX", "components": [{"bom-ref": "pkg:pypi/a@1", "name": "a"}]}))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME="Ubuntu"\nID=ubuntu\n')
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    package = "Package: {}\nStatus: {}\nArchitecture: arm64\nVersion: 1:2.3-4\nDescription: x\n more: y\n"
    (tmp_path / "var/lib/dpkg/status").write_text(
        package.format("libc6", "install ok installed") + "\n" + package.format("gone", "deinstall ok config-files")
    )
    assert add_packages(path, tmp_path) == 1
    once = path.read_text()
    assert add_packages(path, tmp_path) == 1
    assert path.read_text() == once
    components = json.loads(once)["components"]
    assert [each["bom-ref"] for each in components] == ["pkg:deb/ubuntu/libc6@1:2.3-4?arch=arm64", "pkg:pypi/a@1"]


def test_no_cross_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        RemoeError, match=r"^no aarch64-linux-gnu-g\+\+ found.*sudo apt install g\+\+-aarch64-linux-gnu$"
    ):
        cross_compiler()


@CROSS
def test_toolkit_that_is_none(tmp_path: Path) -> None:
    options = JetsonOptions(jetpack("7"), toolkit=tmp_path)
    with pytest.raises(RemoeError, match="is no CUDA toolkit: it has no bin/nvcc"):
        build_bundle(options, tmp_path / "out.tar.gz")


@pytest.mark.skipif(Path("/usr/local/cuda-12.6").exists(), reason="this machine has CUDA 12.6")
def test_cuda_of_jetpack_6_is_not_on_pypi(tmp_path: Path) -> None:
    with pytest.raises(
        RemoeError, match=r"cuda-nvcc-12-6 cuda-cross-aarch64-12-6 .* remoe-edge image build --jetpack 6"
    ):
        build_bundle(JetsonOptions(jetpack("6")), tmp_path / "out.tar.gz")


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--jetpack", "6"], "--jetpack has no effect without --target jetson"),
        (["--no-cuda"], "--no-cuda has no effect without --target jetson"),
        (["-o", "x"], "--output has no effect without --target jetson"),
        (["--target", "jetson", "--check"], "--check has no effect with --target jetson"),
        (["--target", "jetson", "--no-cuda", "--cuda-toolkit", "."], "--cuda-toolkit has no effect with --no-cuda"),
    ],
)
def test_flags_without_effect(arguments: list[str], flag: str) -> None:
    result = CliRunner().invoke(cli, ["build", *arguments])
    assert result.exit_code == 2
    assert flag in result.output


@CROSS
def test_cross_build(tmp_path: Path) -> None:
    """A llama.cpp of a few lines: for aarch64, in the cache under its own key, and installed nowhere."""
    scratch = Scratch(tmp_path)
    code = """
        from remoe_edge.jetson.cross import cross_compiler
        runtime = ensure_runtime(BuildOptions(patches=patches, compiler=cross_compiler()))
        print(json.dumps([str(runtime.root), runtime.wheel.name, runtime.manifest.target, runtime.manifest.flags]))
        """
    root, wheel, target, flags = json.loads(scratch.run(code))
    assert wheel.endswith("-py3-none-linux_aarch64.whl")
    assert target == "any aarch64"
    assert "GGML_NATIVE=OFF" in flags
    assert not [flag for flag in flags if str(tmp_path) in flag], "a key would depend on places of this machine"
    found = artefacts(Path(root))
    assert {artefact.machine for artefact in found} == {"aarch64"}
    assert check(found, jetpack("6")) == check(found, jetpack("7")) == []
    assert scratch.run("print(json.dumps(check_runtime(BuildOptions(patches=patches))))").startswith('["no runtime of')
    assert scratch.build() != Path(root)
    if emulator := shutil.which("qemu-aarch64-static"):
        command = [emulator, "-L", "/usr/aarch64-linux-gnu", f"{root}/bin/llama-cli"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "43\n"


@CROSS
def test_toolchain_file_shapes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cross_compiler().version
    copy = tmp_path / "aarch64.cmake"
    shutil.copyfile(recipes_dir() / "toolchain" / "aarch64.cmake", copy)
    copy.write_text(copy.read_text().replace("cortex-a78ae", "cortex-a76"))
    monkeypatch.setattr("remoe_edge.jetson.cross.toolchain_file", lambda: copy)
    assert cross_compiler().version != before
