"""The build's mechanics on a llama.cpp of a few lines, in a scratch cache and a scratch virtual environment."""

import base64
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path
from textwrap import dedent

import pytest

import remoe_edge
from remoe_edge.errors import RemoeError
from remoe_edge.runtime.pin import Pin
from remoe_edge.runtime.sdist import fetch_sdist, unpack
from remoe_edge.runtime.toolchain import default_jobs, find_compiler, find_tool

TINY_LLAMA = {
    "LICENSE": "MIT, llama.cpp\n",
    "licenses/LICENSE-jsonhpp": "MIT, json\n",
    "include/llama.h": 'extern "C" int answer();\n',
    "src/ggml-base.cpp": 'extern "C" int number() { return 41; }\n',
    "src/ggml.cpp": 'extern "C" int number();\nextern "C" int next() {\n    return number() + 1;\n}\n',
    "src/llama.cpp": '#include "llama.h"\nextern "C" int next();\nint answer() {\n    return next();\n}\n',
    "src/mtmd.cpp": '#include "llama.h"\nextern "C" int twice() { return 2 * answer(); }\n',
    "src/main.cpp": '#include "llama.h"\n#include <cstdio>\nint main() { printf("%d\\n", answer()); }\n',
    "CMakeLists.txt": dedent("""\
        cmake_minimum_required(VERSION 3.14)
        project(tiny C CXX)
        set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
        set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
        include_directories(include)
        foreach(library ggml-base ggml llama mtmd)
            add_library(${library} SHARED src/${library}.cpp)
            set_target_properties(${library} PROPERTIES VERSION 1.2.3 SOVERSION 1)
        endforeach()
        target_link_libraries(ggml ggml-base)
        target_link_libraries(llama ggml)
        target_link_libraries(mtmd llama)
        foreach(name bench cli completion fit-params gguf-split perplexity quantize server)
            set(tool llama-${name})
            add_executable(${tool} src/main.cpp)
            target_link_libraries(${tool} llama)
        endforeach()
        # end
        """),
}
TINY_SDIST = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 9.9\nSummary: bindings\n\nText.\n",
    "LICENSE.md": "MIT, bindings\n",
    "llama_cpp/__init__.py": dedent("""\
        import ctypes, pathlib
        folder = pathlib.Path(__file__).parent / "lib"
        llama = ctypes.CDLL(str(folder / "libllama.so"))
        ggml = ctypes.CDLL(str(folder / "libggml.so"))
        mtmd = ctypes.CDLL(str(folder / "libmtmd.so"))
        """),
    "llama_cpp/server/app.py": "",
    "vendor/llama.cpp/.git": "gitdir: nowhere\n",
}
HOOK = """\
This patch makes the answer odd.

--- a/src/llama.cpp
+++ b/src/llama.cpp
@@ -3,3 +3,3 @@
 int answer() {
-    return next();
+    return next() + 1;
 }
--- a/CMakeLists.txt
+++ b/CMakeLists.txt
@@ -19,2 +19,3 @@
 endforeach()
+add_executable(test-expert-tiny EXCLUDE_FROM_ALL tests/test-expert-tiny.cpp)
 # end
"""


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


class Scratch:
    """A cache with a tiny pinned sdist, patches for it, and a virtual environment to install into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.patches = folder / "patches"
        sdist = self.cache / "sdist" / "llama_cpp_python-9.9.tar.gz"
        sdist.parent.mkdir(parents=True)
        tree = write_tree(folder / "sdist", TINY_SDIST)
        write_tree(tree / "vendor" / "llama.cpp", TINY_LLAMA)
        with tarfile.open(sdist, "w:gz") as archive:
            archive.add(tree, "llama_cpp_python-9.9")
        release = {"version": "9.9", "sha256": hashlib.sha256(sdist.read_bytes()).hexdigest()}
        pin = {"llama_cpp_python": release, "llama_cpp": {"commit": "abc"}}
        sources = {"sources/tests/test-expert-tiny.cpp": "int main() { return 0; }\n"}
        write_tree(self.patches, {"pin.json": json.dumps(pin), "series": "hook.patch\n", "hook.patch": HOOK, **sources})
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        # After its own packages, the scratch environment sees those of this one, but for a runtime installed in it.
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(
            subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        )
        outer = folder / "outer"
        outer.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith("llama_cpp"):
                (outer / entry.name).symlink_to(entry)
        (site / "outer.pth").write_text(f"{Path(remoe_edge.__file__).parents[1]}\n{outer}\n")

    def start(self, code: str, **environment: str) -> "subprocess.Popen[str]":
        """Run Python code in the scratch environment, with the build's functions at hand."""
        head = f"""
            import json, sys
            from pathlib import Path
            from remoe_edge.cli import main, cli
            from remoe_edge.runtime import build
            from remoe_edge.runtime.build import BuildOptions, check_runtime, ensure_runtime
            patches = Path({str(self.patches)!r})
            """
        variables = {k: v for k, v in os.environ.items() if k not in ("CFLAGS", "CXXFLAGS", "LDFLAGS", "PYTHONPATH")}
        return subprocess.Popen(
            [self.python, "-c", dedent(head) + dedent(code)],
            env={**variables, "REMOE_EDGE_CACHE": str(self.cache), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def run(self, code: str, **environment: str) -> str:
        """Stdout of Python code that must succeed."""
        process = self.start(code, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    def fail(self, code: str, **environment: str) -> str:
        """The message of the RemoeError that Python code must end with."""
        process = self.start(code, **environment)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "remoe_edge.errors.RemoeError: " in err, err
        return err.split("remoe_edge.errors.RemoeError: ")[1]

    def build(self, **environment: str) -> Path:
        """Build and install; return the runtime's folder."""
        return Path(self.run("print(ensure_runtime(BuildOptions(patches=patches)).root)", **environment).strip())

    def runtimes(self) -> list[str]:
        folder = self.cache / "runtime"
        return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Scratch:
    """One with its runtime built and installed, for tests that leave it so."""
    scratch = Scratch(tmp_path_factory.mktemp("built"))
    scratch.build()
    return scratch


def test_build_install_check_reuse(scratch: Scratch) -> None:
    check = "print(json.dumps(check_runtime(BuildOptions(patches=patches))))"
    assert json.loads(scratch.run(check)) == ["no runtime of remoe-edge is installed in this environment"]
    root = scratch.build()

    libraries = ["libggml-base.so", "libggml.so", "libllama.so", "libmtmd.so"]
    assert sorted(os.listdir(root)) == ["LICENSES", "bin", "lib", "manifest.json", "wheel"]
    assert sorted(os.listdir(root / "lib")) == libraries
    assert "llama-server" in os.listdir(root / "bin")
    assert subprocess.run([root / "bin" / "test-expert-tiny"], check=False).returncode == 0
    assert sorted(os.listdir(root / "LICENSES")) == ["jsonhpp", "llama-cpp-python", "llama.cpp"]
    assert os.listdir(scratch.cache / "build") == []

    # One copy of each library, although they find each other by name and Python loads them by path.
    loaded = scratch.run("""
        import llama_cpp
        assert llama_cpp.llama.answer() == 43 and llama_cpp.mtmd.twice() == 86
        lines = Path("/proc/self/maps").read_text().splitlines()
        print(json.dumps(sorted({line.split()[-1] for line in lines if "/lib" in line and "ggml" in line})))
        """)
    assert [Path(path).name for path in json.loads(loaded)] == ["libggml-base.so", "libggml.so"]
    assert all(path.startswith(str(scratch.folder / "venv")) for path in json.loads(loaded))

    assert json.loads(scratch.run(check)) == []
    # Found again without cmake and ninja; only the compiler is asked for its version, a part of the key.
    compilers = find_compiler(cuda=False).variables
    path = scratch.folder / "path"
    path.mkdir()
    assert scratch.build(**compilers, PATH=str(path)) == root

    with (scratch.patches / "hook.patch").open("a") as file:
        file.write("more\n")
    (difference,) = json.loads(scratch.run(check))
    assert difference.startswith("patches: installed ")
    assert scratch.build() != root
    assert len(scratch.runtimes()) == 2
    assert json.loads(scratch.run(check)) == []
    (wheel,) = scratch.cache.glob(f"runtime/{scratch.build().name}/wheel/*")
    content = wheel.read_bytes()
    scratch.run("ensure_runtime(BuildOptions(patches=patches, clean=True))")
    assert len(scratch.runtimes()) == 1
    assert wheel.read_bytes() == content


def test_wheel_is_well_formed(built: Scratch) -> None:
    (root,) = (built.cache / "runtime").iterdir()
    (wheel,) = (root / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    info = f"llama_cpp_python-9.9+remoe.{root.name}.dist-info"
    assert f"\nVersion: 9.9+remoe.{root.name}\n" in members[f"{info}/METADATA"].decode()
    assert {"llama_cpp/server/app.py", "llama_cpp/lib/libggml.so", f"{info}/licenses/LICENSE.md"} <= members.keys()
    rows = list(csv.reader(io.StringIO(members[f"{info}/RECORD"].decode())))
    assert sorted(row[0] for row in rows) == sorted(members)
    for name, digest, size in rows:
        if name != f"{info}/RECORD":
            expected = base64.urlsafe_b64encode(hashlib.sha256(members[name]).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={expected}", len(members[name]))


def test_runtime_may_move_and_ignores_other_libraries(built: Scratch, tmp_path: Path) -> None:
    (root,) = (built.cache / "runtime").iterdir()
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    decoy = write_tree(tmp_path / "decoy", {"decoy.cpp": 'extern "C" int answer() { return 0; }\n'})
    cxx = find_compiler(cuda=False).variables["CXX"]
    subprocess.run([cxx, "-shared", "-fPIC", "-o", decoy / "libllama.so", decoy / "decoy.cpp"], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(decoy)}
    out = subprocess.run([moved / "bin" / "llama-cli"], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout == "43\n"


def test_compile_error_is_shown_and_nothing_published(scratch: Scratch) -> None:
    broken = HOOK.replace("next() + 1", "no_such_function()")
    (scratch.patches / "hook.patch").write_text(broken)
    message = scratch.fail("ensure_runtime(BuildOptions(patches=patches))")
    assert "no_such_function" in message
    assert "compile.log" in message
    assert scratch.runtimes() == []
    (scratch.patches / "hook.patch").write_text(HOOK)
    assert scratch.build().exists()


def test_patch_that_does_not_fit(scratch: Scratch) -> None:
    (scratch.patches / "hook.patch").write_text(HOOK.replace("-    return next();", "-    return other();"))
    message = scratch.fail("ensure_runtime(BuildOptions(patches=patches))")
    assert "hunk 1 of 1 (@@ -3,3 +3,3 @@) of hook.patch does not fit src/llama.cpp" in message
    assert scratch.runtimes() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_build_goes_on_later(scratch: Scratch, number: signal.Signals, status: int) -> None:
    gate, reached, script = (scratch.folder / name for name in ("gate", "reached", "slow.sh"))
    script.write_text(f"touch {reached}\nwhile ! test -e {gate}; do sleep 0.1; done\n")
    slow = f"add_custom_target(slow COMMAND sh {script})\n+add_dependencies(llama slow)\n+"
    (scratch.patches / "hook.patch").write_text(
        HOOK.replace("@@ -19,2 +19,3 @@", "@@ -19,2 +19,5 @@").replace("+add_executable(", f"+{slow}add_executable(")
    )
    code = """
        build.patches_dir = lambda: patches
        sys.argv = ["remoe-edge", "build"]
        main()
        """
    process = scratch.start(code)
    deadline = time.monotonic() + 60
    while not reached.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    # A second build of the same runtime waits for the first.
    second = scratch.start(code)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert scratch.runtimes() == []
    gate.touch()
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert [Path(out.strip()).name] == scratch.runtimes()


def test_source_is_copied(scratch: Scratch) -> None:
    checkout = write_tree(scratch.folder / "checkout", TINY_LLAMA)
    write_tree(
        checkout,
        {".git/HEAD": "x", "build/junk.o": "x", "src/ggml-base.cpp": 'extern "C" int number() { return 1; }\n'},
    )
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    options = f"BuildOptions(patches=patches, source=Path({str(checkout)!r}))"
    root = Path(scratch.run(f"print(ensure_runtime({options}).root)").strip())
    assert subprocess.run([root / "bin" / "llama-cli"], capture_output=True, text=True, check=True).stdout == "3\n"
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before
    check = f"print(json.dumps(check_runtime({options})))"
    (checkout / "build" / "junk.o").write_text("y")
    assert json.loads(scratch.run(check)) == []
    (checkout / "src" / "main.cpp").write_text("int main() {}\n")
    (difference,) = json.loads(scratch.run(check))
    assert difference.startswith("source: ")
    # Without --source the pinned llama.cpp is wanted.
    names = {
        line.split(":")[0]
        for line in json.loads(scratch.run("print(json.dumps(check_runtime(BuildOptions(patches=patches))))"))
    }
    assert names == {"llama_cpp", "source", "flags"}
    (checkout / "include" / "llama.h").unlink()
    assert "is not a llama.cpp checkout: it has no include/llama.h" in scratch.fail(f"ensure_runtime({options})")


def test_other_llama_cpp_python_is_replaced(built: Scratch) -> None:
    site = next((built.folder / "venv" / "lib").glob("python*/site-packages"))
    installed = site / "llama_cpp" / "lib" / "remoe-edge.json"
    installed.unlink()
    assert "no runtime of remoe-edge" in built.run("print(check_runtime(BuildOptions(patches=patches)))")
    built.build()
    assert installed.exists()
    # An installation that was cut short lacks pip's last file.
    (installer,) = site.glob("llama_cpp_python-*/INSTALLER")
    installer.unlink()
    assert "no runtime of remoe-edge" in built.run("print(check_runtime(BuildOptions(patches=patches)))")
    built.build()


def test_default_keeps_the_installed_runtime(scratch: Scratch) -> None:
    checkout = write_tree(scratch.folder / "checkout", TINY_LLAMA)
    head = "build.patches_dir = lambda: patches\n"
    root = scratch.run(f"{head}print(ensure_runtime(BuildOptions(source=Path({str(checkout)!r}))).root)")
    assert scratch.run(f"{head}print(ensure_runtime().root)") == root
    # Also in an image without a compiler.
    assert scratch.run(f"{head}print(ensure_runtime().root)", PATH="/nonexistent", CC="", CXX="") == root
    assert "compiler found" in scratch.fail(f"{head}ensure_runtime(BuildOptions())", PATH="/nonexistent", CC="", CXX="")
    (scratch.patches / "sources" / "new.h").touch()
    assert scratch.run(f"{head}print(ensure_runtime().root)") != root


def test_environment_is_part_of_the_key(scratch: Scratch) -> None:
    code = """
        from remoe_edge.runtime.pin import load_pin
        from remoe_edge.runtime.toolchain import find_compiler
        compiler = find_compiler(cuda=False)
        print(build._plan(BuildOptions(), patches, load_pin(patches), compiler).key)
        print(build._plan(BuildOptions(cuda=True), patches, load_pin(patches), compiler).key)
        """
    keys = [
        *scratch.run(code).split(),
        *scratch.run(code, CXXFLAGS="-O1").split(),
        *scratch.run(code, LDFLAGS="-s").split(),
    ]
    assert len(set(keys)) == 6
    assert scratch.run(code).split() == keys[:2]


def test_command(scratch: Scratch) -> None:
    code = """
        build.patches_dir = lambda: patches
        sys.argv = ["remoe-edge", "build", {}]
        main()
        """
    process = scratch.start(code.format("'--json', '-j1'"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    printed = json.loads(out)
    assert printed["manifest"]["llama_cpp_python"] == "9.9"
    assert Path(printed["wheel"]).is_relative_to(printed["root"])
    assert "Compiling llama.cpp 100 %\n" in err
    assert scratch.run(code.format("")) == f"{printed['root']}\n"
    assert scratch.run(code.format("'--check'")) == ""
    (scratch.patches / "sources" / "new.h").touch()
    process = scratch.start(code.format("'--check', '--json'"))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out)["matches"] is False


def test_wrong_sdist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOE_EDGE_CACHE", str(tmp_path))
    write_tree(tmp_path, {"sdist/llama_cpp_python-1.2.tar.gz": "something"})
    with pytest.raises(RemoeError, match=r"llama_cpp_python-1\.2\.tar\.gz is not the pinned file .*; delete it"):
        fetch_sdist(Pin("1.2", "0" * 64, "abc"))


def test_failed_download_says_where_the_file_may_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOE_EDGE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(RemoeError, match=r"put llama_cpp_python-1\.2\.tar\.gz into"):
        fetch_sdist(Pin("1.2", "0" * 64, "abc"))
    assert os.listdir(tmp_path / "sdist") == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("top/link", tarfile.SYMTYPE),
        ("top/../../out", tarfile.REGTYPE),
        ("/etc/x", tarfile.REGTYPE),
        ("top/fifo", tarfile.FIFOTYPE),
    ],
)
def test_unsafe_archive_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = "/etc/passwd"
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(RemoeError, match="refusing to unpack"):
        unpack(tmp_path / "bad.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_tools_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CC", "CXX", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    compilers = find_compiler(cuda=False).variables
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RemoeError, match=r"no C compiler found; .* apt install build-essential"):
        find_compiler(cuda=False)
    with pytest.raises(
        RemoeError, match=r"no no-such-tool found; .*remoe-edge\[build\].*apt install cmake ninja-build"
    ):
        find_tool("no-such-tool")
    monkeypatch.setenv("CC", compilers["CC"])
    with pytest.raises(RemoeError, match=r"no C\+\+ compiler found"):
        find_compiler(cuda=False)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(RemoeError, match="CXX is set to 'no-such-compiler -O2'"):
        find_compiler(cuda=False)
    (tmp_path / "false").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "false").chmod(0o755)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RemoeError, match="false --version failed"):
        find_compiler(cuda=False)


def test_default_jobs() -> None:
    assert 1 <= default_jobs() <= len(os.sched_getaffinity(0))
