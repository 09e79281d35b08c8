"""Container images: the recipe, what is asked of the engine, and one sentence for everything that goes wrong.

That the recipe gives an image which works is shown by scripts/check_jetson.py, which takes minutes.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from fake_jetson import orin_nx

from remoe_edge.cli import cli
from remoe_edge.errors import RemoeError
from remoe_edge.jetson.bundle import Bundle
from remoe_edge.jetson.container import RunOptions, plan_run
from remoe_edge.jetson.engine import Engine, check_emulation, check_space, explain, find_engine
from remoe_edge.jetson.image import ImagePlan, context
from remoe_edge.jetson.pins import jetpack, recipes_dir

ROOT = Path(__file__).resolve().parents[1]
RECIPE = recipes_dir() / "Dockerfile"
DOCKER = Engine("docker", "docker")
BUILDAH = Engine("buildah", "buildah")


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def bundle(path: Path, **changes: object) -> Path:
    """A file that says it is a bundle."""
    content = {**asdict(Bundle("1", "key", "aarch64", "3.12", True, 1000)), **changes}
    inside = path.with_suffix(".json")
    inside.write_text(json.dumps(content))
    with tarfile.open(path, "w:gz") as archive:
        archive.add(inside, "remoe-edge/bundle.json")
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["image", *arguments])


def sentence(result: Result) -> str:
    assert isinstance(result.exception, RemoeError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, but for a shell's own tools."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_no_engine(programs: Path) -> None:
    with pytest.raises(
        RemoeError, match=r"^no container engine: docker is not installed; buildah is not installed\. Inst"
    ):
        find_engine()
    with pytest.raises(RemoeError, match=r"^no container engine: buildah is not installed\."):
        find_engine("buildah")


def test_engine_that_does_not_answer(programs: Path) -> None:
    script(programs, "docker", 'echo "Cannot connect to the Docker daemon at unix:///x.sock" >&2; exit 1')
    with pytest.raises(
        RemoeError, match=r"docker does not work: its daemon does not answer \(Cannot connect to the Docker"
    ):
        find_engine("docker")
    # By itself the one that works is taken.
    script(programs, "buildah", "echo '{}'")
    assert find_engine().name == "buildah"
    script(programs, "docker", "echo 28.2")
    assert find_engine().name == "docker"


def test_dry_run_says_the_whole_plan(programs: Path) -> None:
    for name, release, cuda, base in (
        ("6", "22.04", "12.6", "nvcr.io/nvidia/l4t-cuda:12.6.11-runtime"),
        ("7", "24.04", "13.2", "nvcr.io/nvidia/cuda:13.2.1-runtime-ubuntu24.04"),
    ):
        result = invoke("build", "--jetpack", name, "--dry-run", "--json")
        assert result.exit_code == 0, result.output
        plan = json.loads(result.stdout)
        assert (plan["ubuntu"], plan["cuda"], plan["gpu_architecture"]) == (release, cuda, "87-real")
        assert plan["arguments"]["RUNTIME_IMAGE"] == base
        assert plan["tag"] == f"remoe-edge:jetpack{name}"
        assert "linux/arm64" in plan["command"]
        assert "no container engine" in result.stderr
    text = invoke("build", "--jetpack", "7", "--dry-run", "--no-cuda", "--runtime-image", "my/base:1", "-t", "me:1")
    assert "my/base:1 (linux/arm64)" in text.stdout
    assert "Without CUDA" in text.stdout
    assert " -t me:1 " in text.stdout


def test_arguments_are_those_of_the_recipe() -> None:
    plan = ImagePlan(jetpack("7"), BUILDAH, "t", "a", "b", "3.12")
    declared = set(re.findall(r"^ARG (\w+)", RECIPE.read_text(), re.MULTILINE))
    assert plan.arguments.keys() == declared
    assert plan.command(Path("/c"))[:7] == ["bud", "--format", "docker", "--isolation", "chroot", "--arch", "arm64"]


@pytest.mark.parametrize(
    ("changes", "arguments", "reason"),
    [
        ({"machine": "x86_64"}, [], "is for x86_64, but a Jetson is aarch64; make one with: remoe-edge build --target"),
        ({"python": "3.10"}, [], "is for Python 3.10, the image for 3.12; pass --python 3.10 or make another"),
        ({"cuda": False}, [], "is without CUDA, the image is to be with it; pass --no-cuda, or make another"),
        ({}, ["--no-cuda"], "is with CUDA, the image is to be without it; leave out --no-cuda"),
    ],
)
def test_tarball_that_does_not_fit(
    tmp_path: Path, changes: dict[str, object], arguments: list[str], reason: str
) -> None:
    path = bundle(tmp_path / "b.tar.gz", **changes)
    result = invoke("build", "--jetpack", "7", "--dry-run", "--tarball", str(path), *arguments)
    assert sentence(result).startswith(f"{path} {reason}")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--force"], "--force has no effect without --sbom"),
        (["--tarball", __file__, "-j", "2"], "--jobs has no effect with --tarball"),
    ],
)
def test_flags_without_effect(arguments: list[str], reason: str) -> None:
    result = invoke("build", "--jetpack", "7", *arguments)
    assert (result.exit_code, reason in result.output) == (2, True)


def test_no_space() -> None:
    with pytest.raises(RemoeError, match=r"^/tmp has .* free, but the image needs about 1048576 TiB; free some there$"):
        check_space(Path("/tmp"), 1 << 60, "the image")
    check_space(Path("/tmp/not/there"), 1, "the image")


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine runs aarch64 programs by itself")
def test_no_emulation(tmp_path: Path) -> None:
    with pytest.raises(
        RemoeError, match=r"cannot run aarch64 programs.*: sudo apt install qemu-user-static binfmt-support"
    ):
        check_emulation(BUILDAH, tmp_path)
    (tmp_path / "qemu-aarch64").touch()
    check_emulation(BUILDAH, tmp_path)


# Ends of what engines said; the first four are of buildah 1.28, run for this.
@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "[2/2] STEP 6/20: RUN x\nremoe-edge: RUNTIME_IMAGE has no CUDA 13 (no libcudart.so.13); name one with it\n"
            'subprocess exited with status 1\nError: building at STEP "RUN x": exit status 1\n',
            "RUNTIME_IMAGE has no CUDA 13 (no libcudart.so.13); name one with it",
        ),
        (
            "Error: creating build container: localhost/nothing:here: image not known\n",
            "a base image cannot be had (creating build container: localhost/nothing:here: image not known); name",
        ),
        (
            'level=warning msg="Failed, retrying (1/3). pinging container registry h: refused"\nError: creating build '
            "container: initializing source docker://h/x:1: pinging container registry h: connection refused\n",
            "a base image cannot be had (creating build container: initializing source docker://h/x:1: pinging",
        ),
        ("exec container process `/bin/sh`: Exec format error\n", "this machine cannot run aarch64 programs"),
        ("write /layer.tar: no space left on device\n", "no space left in buildah's storage; free some with: buildah"),
        ("#9 1.21 remoe-edge: RUNTIME_IMAGE has no apt-get\n#9 ERROR: exit code: 1\n", "RUNTIME_IMAGE has no apt-get"),
        ("docker: unknown command: docker buildx\n", "docker has no buildx"),
        ("something new\n", "buildah failed; all of its output is in /tmp/log\nsomething new"),
    ],
)
def test_reasons(output: str, reason: str) -> None:
    assert explain(output, BUILDAH, Path("/tmp/log")).startswith(reason)


def prepare(tmp_path: Path, programs: Path, machine: str, cuda: str = "1") -> str:
    """What the first step of the runtime stage says about a base image, which is the folder `image`."""
    script(programs, "uname", f"echo {machine}")
    for tool in ("find", "sh", "cut"):
        found = shutil.which(tool, path="/usr/bin:/bin")
        assert found
        (programs / tool).symlink_to(found)
    (tmp_path / "image").mkdir(exist_ok=True)
    environment = {"PATH": str(programs), "ROOT": str(tmp_path / "image"), "CUDA": cuda, "PYTHON": "3.12"}
    result = subprocess.run(
        ["/bin/sh", recipes_dir() / "image" / "prepare.sh"],
        env={**environment, "CUDA_VERSION_WANTED": "13.2"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    return result.stderr


def test_base_image_of_the_wrong_architecture(tmp_path: Path, programs: Path) -> None:
    assert prepare(tmp_path, programs, "x86_64").startswith("remoe-edge: RUNTIME_IMAGE is for x86_64, but a Jetson is")


def test_base_image_without_cuda(tmp_path: Path, programs: Path) -> None:
    assert prepare(tmp_path, programs, "aarch64").startswith("remoe-edge: RUNTIME_IMAGE has no CUDA 13 (no libcudart")


def test_base_image_without_cublas(tmp_path: Path, programs: Path) -> None:
    (tmp_path / "image/usr/lib").mkdir(parents=True)
    (tmp_path / "image/usr/lib/libcudart.so.13.2").touch()
    assert prepare(tmp_path, programs, "aarch64").startswith("remoe-edge: RUNTIME_IMAGE has no cuBLAS 13;")


def test_base_image_without_apt(tmp_path: Path, programs: Path) -> None:
    assert prepare(tmp_path, programs, "aarch64", cuda="0").startswith("remoe-edge: RUNTIME_IMAGE has no apt-get")


def test_context_with_a_tarball(tmp_path: Path) -> None:
    path = bundle(tmp_path / "b.tar.gz")
    with context(ImagePlan(jetpack("7"), DOCKER, "t", "a", "b", "3.12", tarball=path)) as folder:
        assert (folder / "context/bundle.tar.gz").read_bytes() == path.read_bytes()
        # Everything that the recipe copies is there, and nothing else is brought along.
        sources = re.findall(r"^COPY (?!--from)(\S+) ", RECIPE.read_text(), re.MULTILINE)
        assert all((folder / source).exists() for source in sources)
        assert sorted(os.listdir(folder / "context")) == ["build.sh", "bundle.tar.gz"]
    assert not folder.exists()


# The recipe.


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", " ", RECIPE.read_text())
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line and line[0] not in "# "]


def test_recipe_keeps_its_promises() -> None:
    found = instructions()
    stages = [rest for word, rest in found if word == "FROM"]
    assert stages == ["--platform=linux/amd64 ${BUILD_IMAGE} AS build", "--platform=linux/arm64 ${RUNTIME_IMAGE}"]
    last = found[[index for index, (word, _) in enumerate(found) if word == "FROM"][-1] :]
    words = [word for word, _ in last]
    assert ("ENTRYPOINT", '["remoe-edge"]') in last
    assert "HEALTHCHECK" in words
    (user,) = [rest for word, rest in last if word == "USER"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user), "a number other than root's"
    assert words.index("USER") > max(index for index, word in enumerate(words) if word == "RUN")
    labels = " ".join(rest for word, rest in last if word == "LABEL")
    assert {"title", "description", "licenses", "version", "revision"} <= set(re.findall(r"image\.(\w+)=", labels))
    # Nothing compiles under emulation.
    emulated = " ".join(rest for word, rest in last if word == "RUN") + (recipes_dir() / "image/prepare.sh").read_text()
    assert not re.search(r"nvcc|g\+\+|gcc|cmake|ninja|pip install", emulated)
    environment = " ".join(rest for word, rest in last if word == "ENV")
    # Decoding a MoE model hangs on an Orin with it (llama.cpp #19219).
    assert "CUDA_SCALE_LAUNCH_QUEUES" not in environment


def test_hadolint() -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("no hadolint to check the recipe with here; the test above knows the main rules")
    result = subprocess.run([program, "--no-color", RECIPE], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_shell_scripts_are_posix() -> None:
    for path in [*(recipes_dir() / "image").glob("*.sh"), recipes_dir() / "bundle" / "remoe-edge"]:
        assert subprocess.run(["/bin/sh", "-n", path], capture_output=True, text=True).stderr == ""


def test_compose_file() -> None:
    content = yaml.safe_load((recipes_dir() / "compose.yaml").read_text())
    serve, bench = content["services"]["serve"], content["services"]["bench"]
    assert (serve["restart"], serve["command"][0], bench["command"][0]) == ("unless-stopped", "serve", "bench")
    assert bench["profiles"] == ["bench"], "or it would start with the server"
    assert all(port.startswith("127.0.0.1:") for port in serve["ports"])
    for service in (serve, bench):
        assert service["runtime"] == "nvidia"
        # Each option of the command is one that the command has.
        name, _model, *options = service["command"]
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command
        known = {option for parameter in command.params for option in parameter.opts}
        assert {option.partition("=")[0] for option in options} <= known


def test_unit_starts_the_compose_service() -> None:
    unit = (recipes_dir() / "systemd" / "remoe-edge-container.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    assert start.split()[-1] == "serve"
    given = set(re.findall(r"^#   (REMOE_\w+)=", unit, re.MULTILINE))
    asked = set(re.findall(r"\$\{(REMOE_\w+):\?", (recipes_dir() / "compose.yaml").read_text()))
    assert asked <= given, "the server would not start"


# Running it.


def test_run_on_a_jetson(tmp_path: Path) -> None:
    root = orin_nx(tmp_path / "root", 7)
    (root / "run").mkdir()
    (root / "run/jtop.sock").touch()
    models = tmp_path / "my models"
    models.mkdir()
    options = RunOptions("remoe:1", ("serve", "/models/a.gguf"), models, 6 << 30, 9000, root=root)
    plan = plan_run(DOCKER, options, nvidia=True)
    pairs = list(zip(plan.command, plan.command[1:], strict=False))
    for mount in (
        f"{models}:/models:ro",
        "/etc/nv_tegra_release:/etc/nv_tegra_release:ro",
        "/var/lib/nvpmodel:/var/lib/nvpmodel:ro",
        "/etc/nvpmodel.conf:/etc/nvpmodel.conf:ro",
        "/run/jtop.sock:/run/jtop.sock:rw",
    ):
        assert ("-v", mount) in pairs
    assert ("--group-add", str((root / "run/jtop.sock").stat().st_gid)) in pairs
    assert ("--runtime", "nvidia") in pairs
    assert ("--memory", str(6 << 30)) in pairs
    assert ("-p", "127.0.0.1:9000:8080") in pairs
    assert plan.command[-3:] == ["remoe:1", "serve", "/models/a.gguf"]
    assert plan.missing == []


def test_run_says_what_is_missing(tmp_path: Path) -> None:
    root = orin_nx(tmp_path / "root", 6)
    (root / "etc/nvpmodel.conf").unlink()
    plan = plan_run(DOCKER, RunOptions("remoe:1", ("doctor",), root=root), nvidia=False)
    text = "\n".join(plan.missing)
    for words in ("no --models", "/run/jtop.sock is not here", "/etc/nvpmodel.conf is not here", "no NVIDIA runtime"):
        assert words in text
    assert "--runtime" not in plan.command
    assert "this machine is no Jetson" in "".join(
        plan_run(DOCKER, RunOptions("x", ("doctor",), root=tmp_path / "other"), nvidia=False).missing
    )


def test_run_with_buildah(tmp_path: Path) -> None:
    options = RunOptions("remoe:1", ("run", "demo", "-p", "two words"), tmp_path, root=tmp_path)
    plan = plan_run(BUILDAH, options, nvidia=False)
    name = plan.prepare[plan.prepare.index("--name") + 1]
    assert plan.command[-6:] == [name, "--", "remoe-edge", *options.arguments][-6:]
    assert plan.clean == ["buildah", "rm", name]
    with pytest.raises(RemoeError, match="buildah limits no memory and opens no ports; use --engine docker"):
        plan_run(BUILDAH, RunOptions("x", ("doctor",), memory=1, root=tmp_path), nvidia=False)


def test_run_refusals(tmp_path: Path, programs: Path) -> None:
    with pytest.raises(RemoeError, match="is not a folder; name the one with the models"):
        plan_run(DOCKER, RunOptions("x", ("doctor",), tmp_path / "nothing"), nvidia=False)
    script(
        programs,
        "docker",
        'case "$1 $2" in\n'
        "    'version --format') echo 28 ;;\n"
        "    'info --format') echo '{\"runc\": {}}' ;;\n"
        '    \'image inspect\') if [ "$3" = --format ]; then echo s390x; else [ "$3" = there ]; fi ;;\n'
        "    *) exit 9 ;;\n"
        "esac",
    )
    assert "docker has no image gone; make it with remoe-edge image build -t gone" in sentence(
        invoke("run", "-t", "gone", "--", "doctor")
    )
    assert sentence(invoke("run", "-t", "there", "--", "doctor")).startswith("there is for s390x, this machine is ")


def test_run_ends_with_the_status_of_the_command(programs: Path) -> None:
    here = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    script(
        programs,
        "docker",
        'case "$1" in\n'
        "    version) echo 28 ;;\n"
        "    info) echo '{}' ;;\n"
        f"    image) echo {here} ;;\n"
        "    run) exit 7 ;;\n"
        "esac",
    )
    assert invoke("run", "-t", "there", "--", "bench", "demo", "-n", "4").exit_code == 7
