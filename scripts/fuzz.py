"""Fuzzing of everything that reads a file from strangers: ``.venv/bin/python scripts/fuzz.py --seconds 60 [TARGET]...``

Needs ``pip install -e '.[fuzz]'`` (atheris: libFuzzer, with coverage of remoe_edge and zipfile), and for the target
``loader`` the compiled runtime: that one changes the parts of a small model, loads each in a process of its own with
the expert cache on, decodes, and keeps as its guide what the runtime says instead of coverage.

Inputs are kept in ``build/fuzz/TARGET/corpus`` from run to run, findings in ``build/fuzz/TARGET/found``; ``--keep``
puts what reaches code that no smaller input reaches into ``tests/data/fuzz``, where the tests run it again.
"""

import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "fuzz"
LOADER = "loader"
NAMES = ("gguf", "router", "index", "trace", "trace-members", "twin", LOADER)

MAX_INPUT = 4096
TIMEOUT_S = 20
MEMORY = 4 << 30
_WHOSE = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

sys.path.insert(0, str(ROOT / "tests"))


@click.command()
@click.argument("targets", metavar="[TARGET]...", nargs=-1, type=click.Choice(NAMES))
@click.option("--seconds", default=60, show_default=True, help="Time for each target.")
@click.option("--keep", is_flag=True, help="Put the minimised corpus of each target into tests/data/fuzz.")
def main(targets: tuple[str, ...], seconds: int, keep: bool) -> None:
    """Fuzz TARGETs, by default all of them; exit with status 1 if one was brought to more than a RemoeError."""
    failed = []
    for name in targets or NAMES:
        for part in ("corpus", "found"):
            (FOLDER / name / part).mkdir(parents=True, exist_ok=True)
        begun, busy = time.monotonic(), _processor_seconds()
        runs, found = _fuzz_loader(seconds) if name == LOADER else _fuzz(name, seconds)
        spent, busy = time.monotonic() - begun, _processor_seconds() - busy
        row = {"target": name, "seconds": round(spent, 1), "cpu_seconds": round(busy, 1), "runs": runs, "found": found}
        with (FOLDER / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        files = "".join(f" {each}" for each in found)
        click.echo(f"{name}: {runs} runs in {spent:.0f} s, {busy:.0f} s of a processor, {len(found)} found{files}")
        failed += found
        if keep and name != LOADER:
            _keep(name)
    sys.exit(bool(failed))


def _processor_seconds() -> float:
    """Of this process and of its children that ended: beside other work a minute of the clock is less than one."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, _WHOSE))


def _fuzz(name: str, seconds: int) -> tuple[int, list[str]]:
    """Executions, and the files on which the target failed."""
    import fuzz_targets

    corpus, found = FOLDER / name / "corpus", FOLDER / name / "found"
    for index, content in enumerate(fuzz_targets.corpus(name)):
        (corpus / f"kept-{index}").write_bytes(content)
    words = FOLDER / name / "words"
    encoded = [word.encode() if isinstance(word, str) else word for word in fuzz_targets.TARGETS[name].words]
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in encoded))
    before = set(found.iterdir())
    command = [sys.executable, __file__, "--in-atheris", name, str(corpus), f"-dict={words}"]
    command += [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT}", f"-timeout={TIMEOUT_S}", "-rss_limit_mb=3000"]
    command += [f"-artifact_prefix={found}/", "-print_final_stats=1"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    new = sorted(set(found.iterdir()) - before)
    if done.returncode and not new:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    if new:
        click.echo(done.stderr[-3000:], err=True)
    return int(runs[1]) if runs else 0, [str(each) for each in new]


def _in_atheris(name: str, arguments: list[str]) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: pip install -e '.[fuzz]'")
    with atheris.instrument_imports(include=["remoe_edge", "zipfile"]):
        import fuzz_targets
    import warnings

    warnings.simplefilter("ignore")
    atheris.Setup([sys.argv[0], *arguments], fuzz_targets.TARGETS[name].run)
    atheris.Fuzz()


def _keep(name: str) -> None:
    """Write the inputs that reach lines that smaller ones do not, and all on which the target ever failed."""
    import fuzz_targets

    target = fuzz_targets.TARGETS[name]
    seen: set[tuple[str, int]] = set()
    for content in target.seeds():
        seen |= _lines(target.run, content)
    kept = []
    files = {file.read_bytes() for file in (FOLDER / name / "corpus").iterdir()} - set(target.seeds())
    for content in sorted(files, key=lambda content: (len(content), content)):
        new = _lines(target.run, content) - seen
        if new:
            seen |= new
            kept.append(content)
    path = fuzz_targets.CORPORA / f"{name}.zip"
    members = {file.name: file.read_bytes() for file in (FOLDER / name / "found").iterdir()}
    if path.exists():
        with zipfile.ZipFile(path) as archive:
            members |= {each: archive.read(each) for each in archive.namelist() if each.startswith("crash-")}
    members |= {f"{index:03d}": content for index, content in enumerate(kept)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in sorted(members.items()):
            member = zipfile.ZipInfo(each)
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, content)
    click.echo(f"{name}: {len(kept)} inputs kept of {len(files)}")


def _lines(run: Any, content: bytes) -> set[tuple[str, int]]:
    lines: set[tuple[str, int]] = set()

    def trace(frame: FrameType, _event: str, _argument: object) -> Any:
        if "/remoe_edge/" not in frame.f_code.co_filename:
            return None
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        run(content)
    finally:
        sys.settrace(None)
    return lines


#
# the loader
#


def _fuzz_loader(seconds: int) -> tuple[int, list[str]]:
    """Load changed models until the time is over; executions, and the files on which a process ended by a signal."""
    import hostile
    import load_hostile

    os.environ["GGML_NO_BACKTRACE"] = "1"
    load_hostile.runtime._llama()
    rng = random.Random(time.time_ns())
    corpus, found = FOLDER / LOADER / "corpus", FOLDER / LOADER / "found"
    runs, new = 0, []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        sound = hostile.take_apart(hostile.write_sound_model(Path(folder, "sound.gguf")))
        pool, said = [sound], {""}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # What was refused already rarely gets further.
            parts = _changed(sound if rng.random() < 0.6 else rng.choice(pool), rng)
            path = Path(folder, "changed.gguf")
            path.write_bytes(parts.encode())
            outcome, log = _attempt(path)
            runs += 1
            # Numbers and quoted parts come from the file.
            told = re.sub(r"[0-9]+|'[^']*'", "#", outcome)
            if told in said:
                continue
            said.add(told)
            pool.append(parts)
            (corpus / f"{runs:06d}").write_text(f"{outcome}\n")
            # Status 1 with a sentence is how llama.cpp's own assertions end.
            if outcome.startswith("signal"):
                target = found / f"{time.time_ns():x}.gguf"
                target.write_bytes(parts.encode())
                target.with_suffix(".txt").write_text(f"{outcome}\n{log}\n")
                new.append(str(target))
                click.echo(f"{target}: {outcome}\n{log}", err=True)
    return runs, new


def _attempt(path: Path) -> tuple[str, str]:
    """What became of a process that loaded and ran the model, and, if a signal ended it, what llama.cpp said last."""
    import load_hostile

    with tempfile.TemporaryFile() as log:
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 2)
            signal.alarm(TIMEOUT_S)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.write(writable, (load_hostile.attempt(path) or "runs").encode(errors="replace")[:4000])
            os._exit(0)
        os.close(writable)
        with os.fdopen(readable, "rb") as answer:
            text = answer.read().decode(errors="replace").replace(str(path), "")
        _, status = os.waitpid(child, 0)
        log.seek(0)
        said = log.read().decode(errors="replace").strip()[-600:]
    if os.WIFSIGNALED(status):
        place = re.search(r"\S+:\d+: .*", said)
        return f"signal {os.WTERMSIG(status)} {place[0] if place else ''}", said
    return (text or f"status {os.WEXITSTATUS(status)} {said[-200:]}"), said


_TEXTS = ("", "x", "yarn", "longrope", "llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "none", "\0", "a" * 300)
_NUMBERS = (0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 128, 255, 256, 512, 513, 1 << 16, 1 << 31, (1 << 32) - 1)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _changed(parts: Any, rng: random.Random) -> Any:
    parts = replace(parts, fields=dict(parts.fields), tensors=[replace(entry) for entry in parts.tensors])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice((_change_field, _change_field, _add_field, _change_array, _change_tensor, _change_data))(parts, rng)
    return parts


def _scalar(key: str, rng: random.Random, kind: int | None = None) -> bytes:
    import gguf_maker as make

    kind = rng.choice((4, 4, 4, 4, 5, 6, 6, 7, 7, 8, 10, 0)) if kind is None else kind
    if kind == 8:
        return make.field(key, 8, make.text(rng.choice(_TEXTS)))
    value: Any = rng.choice(_NUMBERS)
    value = float(value) * rng.choice((1, -1, float("nan"))) if kind == 6 else bool(value & 1) if kind == 7 else value
    size = 8 * struct.calcsize(_FORMATS[kind])
    if kind not in (6, 7):
        value = value % (1 << size) - ((1 << size - 1) if _FORMATS[kind].islower() else 0)
    return make.field(key, kind, struct.pack("<" + _FORMATS[kind], value))


def _array(key: str, rng: random.Random) -> bytes:
    import gguf_maker as make

    count = rng.choice((0, 1, 2, 2, 2, 3, 4, 323, 512, 513))
    kind = rng.choice((0, 4, 5, 6, 8))
    if kind == 8:
        return make.array_field(key, 8, count, b"".join(make.text(f"t{rng.randrange(400)}") for _ in range(count)))
    size = struct.calcsize(_FORMATS[kind])
    payload = b"".join(rng.choice((bytes(size), b"\xff" * size, b"\1" + bytes(size - 1))) for _ in range(count))
    return make.array_field(key, kind, count, payload)


def _change_field(parts: Any, rng: random.Random) -> None:
    key = rng.choice([key for key in parts.fields if not key.startswith("remoe")])
    choice = rng.random()
    if choice < 0.1:
        del parts.fields[key]
    elif choice < 0.2:
        parts.fields[key] = _array(key, rng)
    else:
        # The first change to the type is refused; what comes after is reached with the right one.
        (kind,) = struct.unpack_from("<I", parts.fields[key], 8 + len(key.encode()))
        parts.fields[key] = _scalar(key, rng, kind if rng.random() < 0.8 and (kind in _FORMATS or kind == 8) else None)


def _add_field(parts: Any, rng: random.Random) -> None:
    """A key that llama.cpp knows; rarely the name of another architecture for all keys."""
    import hostile
    from gguf.constants import MODEL_ARCH_NAMES, Keys

    if rng.random() < 0.15:
        other = rng.choice(list(MODEL_ARCH_NAMES.values()))
        renamed = {}
        for key, field in parts.fields.items():
            name = key.replace(hostile.ARCH, other, 1)
            renamed[name] = field.replace(
                struct.pack("<Q", len(key)) + key.encode(), struct.pack("<Q", len(name)) + name.encode(), 1
            )
        value = other.encode()
        renamed["general.architecture"] = (
            struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, len(value)) + value
        )
        parts.fields.clear()
        parts.fields.update(renamed)
        return
    groups = (Keys.LLM, Keys.Attention, Keys.Rope, Keys.Tokenizer, Keys.SSM)
    names = [value for group in groups for value in vars(group).values() if isinstance(value, str) and "." in value]
    key = rng.choice(names).replace("{arch}", hostile.ARCH)
    parts.fields[key] = _array(key, rng) if rng.random() < 0.3 else _scalar(key, rng)


def _change_array(parts: Any, rng: random.Random) -> None:
    key = rng.choice(("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"))
    parts.fields[key] = _array(key, rng)


def _change_tensor(parts: Any, rng: random.Random) -> None:
    entry = rng.choice(parts.tensors)
    choice = rng.randrange(6)
    if choice == 0:
        shape = list(entry.shape)
        shape[rng.randrange(len(shape))] = rng.choice((*_NUMBERS, 1 << 62))
        entry.shape = tuple(shape)
    elif choice == 1:
        entry.shape = rng.choice((entry.shape[::-1], (*entry.shape, 1), entry.shape[:-1] or (1,)))
    elif choice == 2:
        entry.type = rng.randrange(45)
    elif choice == 3:
        entry.offset = rng.choice((0, entry.offset + 32, 1 << 40, (1 << 64) - 32))
    elif choice == 4:
        entry.name = rng.choice((rng.choice(parts.tensors).name, b"blk.1.x", entry.name.replace(b"blk.0", b"blk.7")))
    else:
        parts.tensors.remove(entry)


def _change_data(parts: Any, rng: random.Random) -> None:
    data = bytearray(parts.data)
    start = rng.randrange(len(data))
    data[start : start + 64] = rng.choice((b"\xff", b"\0", b"\x7f")) * len(data[start : start + 64])
    parts.data = bytes(data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-atheris"]:
        _in_atheris(sys.argv[2], sys.argv[3:])
    else:
        main()
