"""GGUFs from strangers, one for each published class of fault, against everything here that reads one."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf_maker as make
import hostile
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny_model

from remoe_edge.cli import cli
from remoe_edge.device import doctor
from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.gguf_reader import open_ggufs
from remoe_edge.gguf_io.convert import convert, plan_conversion
from remoe_edge.gguf_io.diff import diff
from remoe_edge.gguf_io.layout import has_experts, read_layout, read_model
from remoe_edge.gguf_io.runnable import check_runnable
from remoe_edge.measure.bench import fingerprint
from remoe_edge.measure.matrix import model_sizes
from remoe_edge.measure.plan import make_plan
from remoe_edge.measure.storage import expert_slices
from remoe_edge.runtime.budget import cache_bytes, expert_groups
from remoe_edge.runtime.footprint import footprint
from remoe_edge.runtime.llama import CacheConfig, load_model
from remoe_edge.serve.plan import _Model

HEADER_CASES = [name for name, case in hostile.CASES.items() if case.message is not None]
SHAPE_CASES = [name for name, case in hostile.CASES.items() if case.message is None]

# Everything that takes a GGUF and needs no compiled runtime. Each begins with the same checked reading; this says so.
READERS: dict[str, Callable[[Path], object]] = {
    "read_layout": read_layout,
    "has_experts": has_experts,
    "check_runnable": check_runnable,
    "convert --align": lambda path: convert(path, None, path.with_name("out.gguf"), alignment=4096, force=True),
    "convert ROUTER": lambda path: plan_conversion(
        path, path.with_name("router.safetensors"), path.with_name("o.gguf")
    ),
    "convert --diff": lambda path: diff(path, path),
    "bench (fingerprint)": lambda path: fingerprint(read_model(path)),
    "bench matrix": model_sizes,
    "storage": lambda path: expert_slices(read_model(path)),
    "plan": lambda path: make_plan(path, memory=1 << 32, storage_bytes_per_s=1e9, resident_ms=1.0),
    "plan (budget)": lambda path: cache_bytes(expert_groups(read_model(path)), 2, "lru"),
    "plan (footprint)": lambda path: footprint(read_model(path), 512).total,
    "serve (plan)": lambda path: _Model(read_model(path)).least_budget(CacheConfig("2s")),
    "doctor": lambda path: list(doctor._memory(doctor.Options(model=path), doctor.identity(Path("/")))),
    "eval": lambda path: open_ggufs({"base": path}).__enter__(),
}


def refusal_of(read: Callable[[Path], object], path: Path) -> str | None:
    try:
        read(path)
    except RemoeError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> hostile.Parts:
    path = hostile.write_sound_model(tmp_path_factory.mktemp("sound") / "sound.gguf")
    parts = hostile.take_apart(path)
    assert parts.encode() == path.read_bytes()
    return parts


@pytest.fixture
def router(tmp_path: Path) -> Path:
    values = {
        make.HF_ROUTER.format(layer): make.random_values(layer, hostile.EXPERTS, 64) for layer in range(hostile.BLOCKS)
    }
    return make.write_router(tmp_path / "router.safetensors", values)


@pytest.mark.parametrize("name", HEADER_CASES)
def test_every_reader_refuses(name: str, tmp_path: Path, sound: hostile.Parts, router: Path) -> None:
    case = hostile.CASES[name]
    path = hostile.write_case(tmp_path / "hostile.gguf", sound, case)
    for reader, read in READERS.items():
        with pytest.raises(RemoeError) as refusal:
            read(path)
        message = str(refusal.value)
        assert message.startswith(str(path)), reader
        assert re.search(case.message or "", message), reader
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", SHAPE_CASES)
def test_no_reader_fails_on_what_a_model_says_of_itself(
    name: str, tmp_path: Path, sound: hostile.Parts, router: Path
) -> None:
    """These headers are sound: a reader may go on or refuse, but with a sentence, and soon."""
    path = hostile.write_case(tmp_path / "hostile.gguf", sound, hostile.CASES[name])
    for reader, read in READERS.items():
        # A simulation that takes seconds, and what is the subject below.
        if reader in ("plan", "eval"):
            continue
        refused = refusal_of(read, path)
        assert refused is None or str(path) in refused, reader


# Of these llama.cpp itself gives a reason.
LEFT_TO_LLAMA_CPP = {
    "expert_count_is_0",
    "token_types_are_too_few",
    "token_types_are_bytes",
    "scores_are_bytes",
    "tokens_are_numbers",
    "head_count_is_0",
    "head_count_is_huge",
    "embedding_length_is_huge",
    "experts_of_one_block_differ",
    "experts_have_one_dimension",
    "expert_tensor_is_missing",
    "expert_tensor_has_four_dimensions",
    "rope_is_wider_than_heads",
}


@pytest.mark.parametrize("name", [name for name in SHAPE_CASES if name not in LEFT_TO_LLAMA_CPP])
def test_what_llama_cpp_aborts_on_is_refused_before(name: str, tmp_path: Path, sound: hostile.Parts) -> None:
    case = hostile.CASES[name]
    path = hostile.write_case(tmp_path / "hostile.gguf", sound, case)
    with pytest.raises(RemoeError, match=case.refused):
        check_runnable(path)


def test_the_sound_model_is_runnable(tmp_path: Path) -> None:
    assert len(check_runnable(hostile.write_sound_model(tmp_path / "sound.gguf"))) == 1


def test_a_message_does_not_steer_the_terminal(tmp_path: Path, sound: hostile.Parts) -> None:
    change = hostile.Case(
        hostile._field("general.architecture", hostile.STRING, make.text("\x1b]0;owned\x07\x1b[2J")), None
    )
    path = hostile.write_case(tmp_path / "escape.gguf", sound, change)
    done = subprocess.run(
        [sys.executable, "-m", "remoe_edge", "plan", str(path), "--memory", "4GiB"], capture_output=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: ")
    assert not set(done.stderr) & set(range(32)) - {ord("\n"), ord("\t")}
    assert rb"\x1b]0;owned\x07" in done.stderr


def test_commands_refuse_with_status_1_and_a_sentence(tmp_path: Path, sound: hostile.Parts) -> None:
    path = str(hostile.write_case(tmp_path / "h.gguf", sound, hostile.CASES["extent_is_outside"]))
    for command in (
        ["convert", path, "-o", str(tmp_path / "o.gguf"), "--align", "4096"],
        ["plan", path],
        ["simulate", "--model", path, "--budget", "1MiB"],
        ["doctor", path],
        ["run", path, "-p", "x"],
        ["chat", path],
        ["trace", path, "-o", str(tmp_path / "t.npz")],
    ):
        result = CliRunner().invoke(cli, command)
        assert isinstance(result.exception, RemoeError), (command, result.output)
        assert "takes bytes" in str(result.exception), command


SECRET = b"SECRET!!"
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=6, max_size=6), st.permutations(range(6)), st.sampled_from([64, 4096]))
def test_a_copy_holds_nothing_from_outside_the_tensors(gaps: list[int], order: list[int], alignment: int) -> None:
    """CVE-2026-7482 is a tool that copied what lay behind a tensor; here everything around them is marked."""
    rows = [make.random_values(index, 8, 5, 3).tobytes() for index in range(6)]
    data, entries = b"", {}
    for index, gap in zip(order, gaps, strict=True):
        data += SECRET * 4 * gap
        name = f"blk.{index}.ffn_up_exps.weight"
        entries[index] = make.tensor(name, (3, 5, 8), offset=len(data))
        data += rows[index]
        data += (SECRET * 4)[: -len(data) % 32]
    data += SECRET * 1000
    content = make.gguf([make.u32_field("general.alignment", 32)], [entries[i] for i in range(6)])
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        base, output = Path(folder, "base.gguf"), Path(folder, "out.gguf")
        base.write_bytes(content + data)
        convert(base, None, output, alignment=alignment)
        copied = output.read_bytes()
        layout = read_layout(output)
    assert SECRET not in copied
    position = min(tensor.start for tensor in layout.tensors.values())
    for tensor in sorted(layout.tensors.values(), key=lambda tensor: tensor.start):
        assert not any(copied[position : tensor.start])
        assert copied[tensor.start : tensor.end] == rows[int(tensor.name.split(".")[1])]
        position = tensor.end
    assert not any(copied[position:])


def test_padding_of_the_header_is_not_copied(tmp_path: Path) -> None:
    entry = make.tensor("blk.10.ffn_up_exps.weight", (8, 1, 2))
    header = make.gguf(tensors=[entry])
    path = tmp_path / "base.gguf"
    used = 24 + len(entry)
    assert len(header) > used
    path.write_bytes(header[:used] + SECRET[:1] * (len(header) - used) + bytes(64))
    convert(path, None, tmp_path / "out.gguf", alignment=64)
    assert SECRET[:1] * 2 not in (tmp_path / "out.gguf").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sound: hostile.Parts) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for name, case in hostile.CASES.items():
        hostile.write_case(folder / f"{name}.gguf", sound, case)
    hostile.write_sound_model(folder / "sound.gguf")
    return folder


def outcomes(folder: Path, *options: str) -> dict[str, dict[str, object]]:
    program = Path(__file__).with_name("load_hostile.py")
    done = subprocess.run(
        [sys.executable, str(program), str(folder), *options],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return {name.removesuffix(".gguf"): outcome for name, outcome in found.items()}


@pytest.mark.runtime
def test_the_runtime_refuses_every_file_with_a_reason(folder: Path) -> None:
    """The patched loader, with the cache on and after our checks: it says why, and never ends the process."""
    found = outcomes(folder)
    assert found.pop("sound") == {"signal": None, "error": None}
    assert found.keys() == hostile.CASES.keys()
    ended = {name: outcome for name, outcome in found.items() if outcome["signal"] is not None}
    assert not ended
    for name, outcome in found.items():
        said = str(outcome["error"])
        assert said.startswith(str(folder)), name
        assert re.search(hostile.CASES[name].message or hostile.CASES[name].refused or "", said), (name, said)


@pytest.mark.runtime
def test_the_loader_alone_breaks_no_memory(folder: Path) -> None:
    """Without our checks llama.cpp aborts on some, but no load reads or writes what is not its own."""
    found = outcomes(folder, "--unchecked")
    ended = {name for name, outcome in found.items() if outcome["signal"] is not None}
    # A jump to address 0, when it computes: the one thing that fuzzing found in llama.cpp itself.
    assert ended <= {"matrix_of_type_25"}
    gone = {name for name, outcome in found.items() if "llama.cpp cannot go on" in str(outcome["error"])}
    assert "block_count_is_0" in gone
    assert not gone & set(HEADER_CASES)


@pytest.mark.runtime
@pytest.mark.parametrize(
    "attempt",
    [
        "cycler.__init__.__globals__.os.popen('touch FILE').read()",
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.append.__self__.__class__.__init__.__globals__",
        "lipsum.__globals__['os'].system('touch FILE')",
    ],
)
def test_a_chat_template_runs_no_code(attempt: str, tmp_path: Path) -> None:
    """CVE-2024-34359: llama-cpp-python rendered the templates of models outside Jinja's sandbox."""
    touched = tmp_path / "touched"
    template = "{{ " + attempt.replace("FILE", str(touched)) + " }}"
    path = write_tiny_model(tmp_path / "t.gguf", hostile.ARCH, hidden=64, ff=32, chat_template=template)
    with load_model(path) as model, pytest.raises(RemoeError, match="template"):
        model.chat_prompt("hello")
    assert not touched.exists()


def test_a_table_that_is_looked_up_may_hold_integers(tmp_path: Path, sound: hostile.Parts) -> None:
    for name, refused in (("blk.0.ffn_gate_tid2eid.weight", False), ("blk.0.ffn_gate.weight", True)):

        def change(parts: hostile.Parts, name: str = name) -> None:
            start = len(parts.data) + -len(parts.data) % 32
            parts.tensors.append(hostile.Entry(name.encode(), (2, 4), 26, start))
            parts.data = parts.data.ljust(start, b"\0") + bytes(32)

        path = hostile.write_case(tmp_path / "table.gguf", sound, hostile.Case(change, None))
        assert bool(refusal_of(check_runnable, path)) is refused
