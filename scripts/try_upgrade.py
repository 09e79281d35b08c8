"""Try patches/ on the newest releases of llama-cpp-python: which hunks fit, which moved, which conflict.

    python scripts/try_upgrade.py                     # the newest and the two before
    python scripts/try_upgrade.py --release 0.3.34 --json
    python scripts/try_upgrade.py --compile           # build those that fit, too (long)

A release is downloaded with pip and its SHA-256 recorded. The exit status is 1 if the newest release does not fit.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.runtime.patch import HunkFit, fit_patches
from remoe_edge.runtime.pin import load_pin, patches_dir
from remoe_edge.runtime.pip import run_pip
from remoe_edge.runtime.sdist import unpack

_NAME = "llama-cpp-python"
_VENDORED = Path("vendor", "llama.cpp")


@dataclass
class Trial:
    """`collisions` are own files that the release has, too; `compiled` is None where that was not tried."""

    release: str
    sha256: str
    pinned: bool
    hunks: list[HunkFit]
    collisions: list[str]
    compiled: bool | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def conflicts(self) -> list[HunkFit]:
        return [hunk for hunk in self.hunks if hunk.moved is None]

    @property
    def fits(self) -> bool:
        return not self.conflicts and not self.collisions


def releases() -> list[str]:
    """All of them, the newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", _NAME, "--disable-pip-version-check"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    found = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if not found:
        raise RemoeError(f"pip index versions {_NAME} failed: {done.stderr.strip()}")
    return found[1].split(", ")


def fetch(release: str, folder: Path) -> Path:
    run_pip("download", "--no-deps", f"--no-binary={_NAME}", f"--dest={folder}", f"{_NAME}=={release}")
    return next(folder.glob(f"llama_cpp_python-{release}.tar.gz"))


def try_release(release: str, patches: Path, folder: Path, *, compile_it: bool) -> Trial:
    sdist = fetch(release, folder)
    pin = load_pin(patches)
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    tree = folder / release
    unpack(sdist, tree, only=[_VENDORED])
    (tree / _VENDORED / ".git").unlink(missing_ok=True)
    hunks, collisions = fit_patches(patches, tree / _VENDORED)
    trial = Trial(release, digest, release == pin.version, hunks, list(map(str, collisions)))
    if trial.pinned and digest != pin.sha256:
        trial.problems.append(f"its SHA-256 is not the pinned one, {pin.sha256}")
    if compile_it and trial.fits:
        command = [sys.executable, "-m", "remoe_edge", "build", "--source", str(tree / _VENDORED)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        trial.compiled = done.returncode == 0
        trial.problems += [] if trial.compiled else done.stderr.splitlines()[-30:]
    return trial


def table(trials: list[Trial]) -> str:
    lines = ["| release | sha256 | hunks that fit | moved | conflicts | compiled |", "|---|---|---|---|---|---|"]
    for trial in trials:
        moved = sum(bool(hunk.moved) for hunk in trial.hunks)
        fit = len(trial.hunks) - len(trial.conflicts)
        compiled = {None: "not tried", True: "yes", False: "no"}[trial.compiled]
        cells = [trial.release + " (pinned)" * trial.pinned, trial.sha256[:12], f"{fit} of {len(trial.hunks)}"]
        lines.append(f"| {' | '.join([*cells, str(moved), str(len(trial.conflicts)), compiled])} |")
    for trial in trials:
        lines += [
            f"{trial.release}: {hunk.patch}, {hunk.file}, hunk {hunk.number} ({hunk.header}) does not fit"
            for hunk in trial.conflicts
        ]
        lines += [f"{trial.release}: has {name} itself" for name in trial.collisions]
        lines += [f"{trial.release}: {problem}" for problem in trial.problems]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", action="append", help="instead of the newest; repeatable")
    parser.add_argument("--count", type=int, default=3, help="how many of the newest")
    parser.add_argument("--compile", action="store_true", help="build those that fit; the last one stays installed")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    patches = patches_dir()
    try:
        chosen = args.release or releases()[: args.count]
        with tempfile.TemporaryDirectory() as folder:
            trials = [try_release(each, patches, Path(folder), compile_it=args.compile) for each in chosen]
    except RemoeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(json.dumps([asdict(trial) for trial in trials], indent=1) if args.json else table(trials))
    return 0 if trials[0].fits and trials[0].compiled is not False and not trials[0].problems else 1


if __name__ == "__main__":
    sys.exit(main())
