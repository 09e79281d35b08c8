"""How the image is run on a Jetson: which mounts and devices it needs, and what of that is missing."""

from __future__ import annotations

import grp
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from remoe_edge.device.identity import is_jetson
from remoe_edge.errors import RemoeError
from remoe_edge.jetson.engine import BINFMT, Engine

MODELS = "/models"
_RELEASE = "/etc/nv_tegra_release"
_MODE = ("/var/lib/nvpmodel", "/etc/nvpmodel.conf")
_JTOP = "/run/jtop.sock"
_GROUPS = "/sys/fs/cgroup"
_CACHE = "remoe-edge-cache"
_ARCHITECTURES = {"aarch64": "arm64", "x86_64": "amd64"}


@dataclass(frozen=True)
class RunOptions:
    """What to run.

    Attributes
    ----------
    models
        Folder that the container sees as ``/models``.
    memory
        Bytes that the container may take; the kernel keeps it.
    port
        Of this machine, for `serve` in the container.
    root
        Where ``proc``, ``sys``, ``etc`` and ``run`` are.
    as_root
        Run as root, which `bench --memory-limit` and dropping the page cache need.
    """

    tag: str
    arguments: tuple[str, ...]
    models: Path | None = None
    memory: int | None = None
    port: int | None = None
    as_root: bool = False
    root: Path = Path("/")


@dataclass(frozen=True)
class ContainerPlan:
    """Commands, and what the container will lack; one sentence each.

    ``prepare`` comes before ``command`` and ``clean`` after it; docker needs neither.
    """

    command: list[str]
    prepare: list[str] = field(default_factory=list)
    clean: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def plan_run(engine: Engine, options: RunOptions, *, nvidia: bool, terminal: bool = False) -> ContainerPlan:
    """The engine's command to run the image with all that it can use here.

    ``nvidia``: the engine has NVIDIA's runtime, which shows the GPU to containers. Raises RemoeError if the folder of
    models does not exist.
    """
    root = options.root
    mounts, missing, groups = [], [], []

    def show(path: str, lost: str, *, mode: str = "ro") -> bool:
        if (root / path.lstrip("/")).exists():
            mounts.append(f"{path}:{path}:{mode}")
            return True
        missing.append(f"{path} is not here: {lost}")
        return False

    if options.models is not None:
        if not options.models.is_dir():
            raise RemoeError(f"{options.models} is not a folder; name the one with the models")
        mounts.append(f"{options.models.resolve()}:{MODELS}:ro")
    else:
        missing.append(f"no --models: the container sees no models at {MODELS}; the word demo works as a MODEL")
    if is_jetson(root):
        show(_RELEASE, "JetPack and L4T will not be known")
        for path in _MODE:
            show(path, "the power mode will not be known")
        if show(
            _JTOP, "jtop is not asked for power; the sensors in /sys are (sudo pip install jetson-stats)", mode="rw"
        ):
            groups.append(_group_of(root / _JTOP.lstrip("/"), root))
        if not nvidia:
            missing.append(
                "the engine has no NVIDIA runtime: the GPU is not seen; sudo apt install nvidia-container-toolkit, "
                "then sudo nvidia-ctk runtime configure --runtime=docker and restart docker"
            )
    else:
        missing.append("this machine is no Jetson: no GPU, no power sensor")
    if options.as_root:
        show(_GROUPS, "--memory-limit will not be kept", mode="rw")
    if engine.name == "docker":
        command = engine.command(*_docker(options, mounts, groups, nvidia, terminal))
        return ContainerPlan(command, missing=missing)
    if options.memory is not None or options.port is not None:
        raise RemoeError("buildah limits no memory and opens no ports; use --engine docker")
    name = f"remoe-edge-{os.getpid()}"
    volumes = [each for mount in mounts for each in ("-v", mount)]
    user = ["--user", "0:0"] if options.as_root else []
    run = ["run", "--isolation", "chroot", *volumes, *user, name, "--", "remoe-edge", *options.arguments]
    created = engine.command("from", "--pull-never", "--name", name, options.tag)
    return ContainerPlan(engine.command(*run), created, engine.command("rm", name), missing)


def check_image(engine: Engine, tag: str, machine: str | None = None, binfmt: Path = BINFMT) -> None:
    """Raise RemoeError if the engine has no such image, or if a machine (by default this one) cannot run it."""
    if not engine.exists(tag):
        raise RemoeError(
            f"{engine.name} has no image {tag}; make it with remoe-edge image build -t {tag}, or load it: "
            f"{engine.name} {'load -i' if engine.name == 'docker' else 'pull docker-archive:'}FILE"
        )
    here = _ARCHITECTURES.get(machine or platform.machine(), "")
    found = engine.architecture(tag)
    emulated = machine is None and found == "arm64" and (binfmt / "qemu-aarch64").exists()
    if found != here and not emulated:
        raise RemoeError(f"{tag} is for {found}, this machine is {here or platform.machine()}; run it on a Jetson")


def has_nvidia(engine: Engine) -> bool:
    """Whether the engine can show NVIDIA GPUs to containers."""
    if engine.name != "docker":
        return False
    return "nvidia" in json.loads(engine.ask("info", "--format", "{{json .Runtimes}}"))


def run_container(plan: ContainerPlan) -> int:
    """Run it in the foreground, and return its exit status."""
    if plan.prepare:
        made = subprocess.run(plan.prepare, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if made.returncode != 0:
            raise RemoeError(f"{plan.prepare[0]} failed: {made.stderr.strip()}")
    try:
        with subprocess.Popen(plan.command) as process:
            try:
                return process.wait()
            except BaseException:
                # Ctrl-C reached the container as well; it ends by itself.
                process.wait()
                raise
    finally:
        if plan.clean:
            subprocess.run(plan.clean, stdin=subprocess.DEVNULL, capture_output=True)


def _docker(options: RunOptions, mounts: list[str], groups: list[int], nvidia: bool, terminal: bool) -> list[str]:
    command = ["run", "--rm", "--init", *(["-it"] if terminal else [])]
    # Direct reads pin memory while they run.
    command += ["--ulimit", "memlock=-1"]
    command += ["--runtime", "nvidia"] if nvidia else []
    command += [each for mount in mounts for each in ("-v", mount)]
    command += ["-v", f"{_CACHE}:/var/cache/remoe-edge"]
    command += [each for group in groups for each in ("--group-add", str(group))]
    if options.as_root:
        command += ["--user", "0:0", "--cgroupns", "host"]
    if options.memory is not None:
        # The same for memory and swap: none of the latter.
        command += ["--memory", str(options.memory), "--memory-swap", str(options.memory)]
    if options.port is not None:
        command += ["-p", f"127.0.0.1:{options.port}:8080"]
    return [*command, options.tag, *options.arguments]


def _group_of(socket: Path, root: Path) -> int:
    """The group that may talk to jtop; by its number, because the image does not know its name."""
    if root == Path("/"):
        try:
            return grp.getgrnam("jtop").gr_gid
        except KeyError:
            pass
    return os.stat(socket).st_gid
