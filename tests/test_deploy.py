"""Deploying over SSH, to an sshd of our own on this machine: own port, own keys, own home."""

import getpass
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_twin import write_small_twin

from remoe_edge.cli import cli
from remoe_edge.deploy.deploy import Deployment, deploy
from remoe_edge.deploy.remote import Remote, check, probe
from remoe_edge.deploy.ssh import Host
from remoe_edge.errors import RemoeError
from remoe_edge.jetson.bundle import read_bundle, write_bundle
from remoe_edge.runtime.build import ensure_runtime

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
BENCH = ("--budget", "4s", "-n", "6", "-r", "1", "-t", "1", "--cool-down", "0")
# What a shell would act on, if it saw the name unquoted.
WILD = "a model; touch pwned $(touch pwned) `touch pwned` 'q' \"d\" & * "


@dataclass(frozen=True)
class Server:
    host: Host
    home: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    missing = [name for name in ("ssh", "ssh-keygen", "rsync") if shutil.which(name) is None]
    if sshd is None or missing:
        pytest.skip(
            f"no SSH server to deploy to: {' '.join(missing) or 'sshd'} is missing (apt: openssh-server, rsync)"
        )
    folder = tmp_path_factory.mktemp("sshd")
    home = folder / "home of the user"
    home.mkdir()
    for name in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if os.geteuid() == 0:
        # Where sshd drops its rights; the package's service makes it at boot.
        Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        f'SetEnv "HOME={home}" "PATH={Path(sys.executable).resolve().parent}:{os.environ["PATH"]}"\n'
    )
    known = f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}"
    (folder / "known_hosts").write_text(known)
    # ssh reads the user's own file too, unless one is named.
    (folder / "ssh_config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
    )
    log = folder / "sshd.log"
    with log.open("w") as output:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=output)
    try:
        for _ in range(100):
            if "Server listening" in log.read_text():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield Server(Host("board", identity=folder / "user", config=folder / "ssh_config"), home)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the runtime that is installed here."""
    path = tmp_path_factory.mktemp("bundle") / "here.tar.gz"
    write_bundle(ensure_runtime(), path, python=PYTHON)
    return path


@pytest.mark.runtime
@pytest.mark.timeout(600)
def test_bundle_and_model_there_and_results_back(server: Server, bundle: Path, tmp_path: Path) -> None:
    model = write_small_twin(tmp_path / f"{WILD}.gguf")
    wanted = Deployment(server.host, model, tmp_path / "back", bundle, folder=f"there {WILD}", bench=BENCH)
    told = []
    outcome = deploy(wanted, lambda stage, part: told.append((stage, part)))

    folder = server.home / f"there {WILD}"
    assert outcome.folder == str(folder)
    assert (folder / "models" / model.name).read_bytes() == model.read_bytes()
    assert not list(server.home.rglob("pwned")), "a shell acted on the name"
    assert not list(tmp_path.rglob("pwned"))
    (row,) = [json.loads(line) for line in (tmp_path / "back" / "results.jsonl").read_text().splitlines()]
    assert (row["status"], row["arm"], row["n_gen"]) == ("ok", "cache", 6)
    assert [part for stage, part in told if stage.startswith("board: ")], "how far the benchmark there is"
    # It ran there: on the copy, with the packages and the runtime of the bundle.
    assert row["model_path"] == str(folder / "models" / model.name)
    assert row["runtime_key"] == read_bundle(bundle).runtime
    doctor = json.loads((tmp_path / "back" / "doctor.json").read_text())
    assert {"device", "runtime"} <= {finding["topic"] for finding in doctor["findings"]}
    assert sorted(path.name for path in folder.iterdir()) == ["models", "remoe-edge"]

    # Again: nothing is copied that is there, and results are not overwritten.
    program = folder / "remoe-edge" / "bin" / "remoe-edge"
    before = program.stat().st_ino
    with pytest.raises(RemoeError, match=r"doctor\.json exists; pass --force"):
        deploy(wanted)
    deploy(replace(wanted, force=True, bench=()))
    assert program.stat().st_ino == before


@pytest.mark.runtime
@pytest.mark.timeout(600)
def test_command(server: Server, bundle: Path, tmp_path: Path) -> None:
    host = server.host
    where = ["-F", str(host.config), "-i", str(host.identity), "--folder", str(tmp_path / "far away")]
    bench = ["--bench", shlex.join(BENCH)]
    arguments = [
        "deploy",
        "board",
        "demo",
        "--tarball",
        str(bundle),
        *where,
        *bench,
        "-o",
        str(tmp_path / "out"),
        "--json",
    ]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["rows"][0]["status"] == "ok"
    assert [Path(file).name for file in content["files"]] == ["doctor.json", "results.jsonl"]
    # The demo model was written there, below the folder.
    assert content["rows"][0]["model_path"].startswith(f"{tmp_path}/far away/cache/")


def test_interrupted_copy_goes_on(server: Server, tmp_path: Path) -> None:
    source, target = tmp_path / "a b", server.home / "c 'd'"
    source.write_bytes(os.urandom(3 << 20))
    target.write_bytes(source.read_bytes()[: 2 << 20])
    seen = []
    server.host.send(source, str(target), lambda stage, part: seen.append(part))
    assert target.read_bytes() == source.read_bytes()
    assert seen[-1] == 1
    server.host.fetch(str(target), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_words_arrive_as_they_are(server: Server) -> None:
    words = [WILD, "", "$HOME", "two\nlines", "-n", "*"]
    assert server.host.ask(["printf", "%s\\0", *words]).split("\0")[:-1] == words


def test_probe(server: Server) -> None:
    found = probe(server.host, "deep/er")
    assert found.machine == os.uname().machine
    assert found.folder == f"{server.home}/deep/er"
    assert PYTHON in found.pythons
    assert "rsync" in found.programs
    assert found.writable
    free = shutil.disk_usage(server.home).free
    assert abs(found.free_bytes - free) < free / 4


def test_not_reachable(server: Server, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(RemoeError, match=r"^board cannot be reached: .*Connection refused; check that it is on"):
        probe(replace(server.host, port=port), "x")
    stranger = server.host.identity.with_name("stranger")  # type: ignore[union-attr]
    with pytest.raises(RemoeError, match=r"^board cannot be reached: .*Permission denied.*; put your key there with: "):
        probe(replace(server.host, identity=stranger), "x")
    with pytest.raises(RemoeError, match=r"^nowhere\.invalid cannot be reached: .*[Cc]ould not resolve"):
        probe(replace(server.host, name="nowhere.invalid"), "x")
    with pytest.raises(RemoeError, match=r"cannot be reached: .*; connect once by hand"):
        probe(replace(server.host, options=("-o", "UserKnownHostsFile=/dev/null")), "x")
    with pytest.raises(RemoeError, match=r"^board cannot be reached"):
        server.host.__class__("board", port, config=server.host.config).send(tmp_path, "x")


@pytest.mark.parametrize("name", ["-oProxyCommand=touch pwned", "", "a b", "a;b", "$(x)", "a\nb", "::module"])
def test_host_that_is_none(name: str) -> None:
    with pytest.raises(RemoeError, match="is not a host"):
        Host(name)


FINE = Remote("aarch64", "/data/remoe-edge", 50 << 30, True, "39.2.1", frozenset({"3.12"}), frozenset({"rsync"}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"machine": "x86_64"}, "orin is x86_64, but what is to run there is for aarch64"),
        ({"l4t": "35.6.5"}, "L4T 35.6.5 is not supported; JetPack 6 and, on an Orin, 7.2 or newer are"),
        ({"free_bytes": 3 << 30}, "/data/remoe-edge has 3 GiB free, and 20 GiB are needed"),
        ({"writable": False}, "/data/remoe-edge may not be written; name another folder with --folder"),
        ({"pythons": frozenset({"3.10"})}, "has Python 3.10, but the tarball is for 3.12; make another"),
        ({"pythons": frozenset()}, "has Python none, but the tarball is for 3.12"),
        ({"programs": frozenset()}, "orin has no rsync; install it there"),
    ],
)
def test_machine_that_will_not_do(change: dict[str, object], sentence: str) -> None:
    host = Host("orin")
    check(host, FINE, machine="aarch64", python="3.12", needed=20 << 30, image=False)
    with pytest.raises(RemoeError, match=re.escape(sentence)):
        check(host, replace(FINE, **change), machine="aarch64", python="3.12", needed=20 << 30, image=False)  # type: ignore[arg-type]


def test_image_needs_docker_there() -> None:
    for programs, sentence in ((set(), "docker is not there"), ({"docker"}, "docker does not answer there")):
        remote = replace(FINE, programs=frozenset({"rsync", *programs}))
        with pytest.raises(RemoeError, match=sentence):
            check(Host("orin"), remote, machine="aarch64", python=None, needed=0, image=True)


def test_no_tarball_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["deploy", "orin", "demo"])
    assert "make it: remoe-edge build --target jetson" in str(result.exception)
    (tmp_path / "remoe-edge-jetpack7.tar.gz").write_bytes(b"no gzip")
    result = CliRunner().invoke(cli, ["deploy", "orin", "demo"])
    assert "remoe-edge-jetpack7.tar.gz is not a bundle of remoe-edge" in str(result.exception)
