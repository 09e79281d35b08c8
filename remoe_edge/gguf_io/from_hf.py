"""A GGUF from a Hugging Face checkpoint: llama.cpp's own converter and llama-quantize, with checks around them."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing, scratch_file
from remoe_edge.gguf_io.convert import convert
from remoe_edge.gguf_io.hf_converter import REFUSED
from remoe_edge.gguf_io.layout import SHARD_NAME, check_alignment, read_layout
from remoe_edge.gguf_io.router import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    RouterTensor,
    gguf_router_name,
    parse_object,
    read_index,
    read_router,
    read_safetensors,
    weight_files,
)
from remoe_edge.gguf_io.source import Source
from remoe_edge.processes import child_process
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.pin import load_pin, patches_dir
from remoe_edge.runtime.sdist import vendored_converter
from remoe_edge.sizes import format_size

QUANTS = {
    "F32": 32.0,
    "BF16": 16.0,
    "F16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.7,
    "Q5_1": 6.1,
    "Q5_K_M": 5.8,
    "Q5_K_S": 5.7,
    "Q5_0": 5.7,
    "Q4_1": 5.2,
    "Q4_K_M": 5.0,
    "Q4_K_S": 4.8,
    "Q4_0": 4.8,
    "IQ4_NL": 4.8,
    "IQ4_XS": 4.6,
    "Q3_K_L": 4.5,
    "Q3_K_M": 4.2,
    "Q3_K_S": 3.8,
    "Q2_K": 3.6,
}
"""Types to write, each with about the bits that a weight takes on disk. Smaller ones need an importance matrix."""

_DIRECT = {"F32", "BF16", "F16", "Q8_0"}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken", "tiktoken.model")
_PART = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# Weights in an element of packed formats, where they are more than one.
_PACKED = {"U8": 2, "I32": 8, "U32": 8}
_OVERHEAD = 1.02
_METADATA_BYTES = 64 << 20

_CONVERTER_PROGRESS = re.compile(rb"Writing: +(\d+)%")
_QUANTIZER_PROGRESS = re.compile(rb"\[ *(\d+)/ *(\d+)\]")
_ENDS = re.compile(rb"[\r\n]")
_LINES_SHOWN = 8


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder: `tensors` is what its files hold by key, `routers` the shapes of routers by their GGUF name."""

    folder: Path
    architecture: str
    files: list[Path]
    tensors: dict[str, RouterTensor]
    routers: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Weights, about; formats that pack several into one element differ."""
        return sum(math.prod(tensor.shape) * _PACKED.get(tensor.dtype, 1) for tensor in self.tensors.values())

    @property
    def moe_layers(self) -> int:
        return sum(name.endswith(".weight") for name in self.routers)

    @property
    def is_float32(self) -> bool:
        """Whether most weights are."""
        wide = sum(math.prod(tensor.shape) for tensor in self.tensors.values() if tensor.dtype == "F32")
        return 2 * wide > self.parameters


@dataclass(frozen=True)
class HfPlan:
    """What a conversion will do. `output_bytes` and `disk_bytes`, the most that is needed at once, are estimates."""

    checkpoint: Checkpoint
    output: Path
    quant: str
    intermediate: str | None
    """The type that is quantized; None if the converter writes `quant` itself."""
    router: Path | None
    alignment: int | None
    output_bytes: int
    disk_bytes: int


def read_checkpoint(folder: Path) -> Checkpoint:
    """Look at the folder of a checkpoint: its config, tokenizer and the headers of all its safetensors.

    Raises RemoeError, naming the file, if one is missing or damaged, and for an index that leads out of the folder.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "it is an adapter (PEFT); merge it into its model first" if adapter else "give a checkpoint's folder"
        raise RemoeError(f"{folder}: has no config.json; {what}")
    source = Source.of(config_path)
    with source.open() as descriptor:
        config = parse_object(source, source.read(descriptor, 0, min(source.size, MAX_INDEX_BYTES)))
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise RemoeError(f"{config_path}: has no 'architectures'; save the model with save_pretrained")
    if not any(path.is_file() for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise RemoeError(f"{folder}: has no tokenizer ({_TOKENIZERS[0]} or {_TOKENIZERS[1]}); copy the model's here")
    _check_json(folder / "tokenizer.json")
    _check_json(folder / "tokenizer_config.json")
    tensors: dict[str, RouterTensor] = {}
    files = _weights(folder)
    for file, keys in files.items():
        present = read_safetensors(file)
        for key in keys or present:
            if key not in present:
                raise RemoeError(f"{file}: has no tensor '{key}', which {INDEX_NAME} says is here; download it again")
            tensors[key] = present[key]
    names = {key: gguf_router_name(key) for key in tensors}
    routers = {name: tensors[key].shape for key, name in names.items() if name is not None}
    return Checkpoint(folder, architectures[0], list(files), tensors, routers)


def plan_from_hf(
    folder: Path,
    output: Path,
    *,
    quant: str | None = None,
    router: Path | None = None,
    alignment: int | None = None,
    force: bool = False,
) -> HfPlan:
    """Check everything that can be before hours of work, and write nothing.

    Parameters
    ----------
    quant
        One of QUANTS in any case; by default the checkpoint's 16-bit type, F16 for one of float32.
    router
        A tuned router as `remoe_edge.gguf_io.convert.convert` takes it.
    alignment
        Of the output's tensors in bytes; by default llama.cpp's.

    Raises RemoeError where the checkpoint, the router, the output's place or the disk will not do.
    """
    if quant is not None and quant.upper() not in QUANTS:
        raise RemoeError(f"{quant!r} is no type to write; choose one of {', '.join(QUANTS)}")
    if SHARD_NAME.fullmatch(output.name):
        raise RemoeError(f"{output}: is named like a part of a split GGUF, but the output is one file; rename it")
    refuse_existing(output, force)
    if not output.resolve().parent.is_dir():
        raise RemoeError(f"{output}: its folder does not exist; create it first")
    if alignment is not None:
        check_alignment(alignment)
    checkpoint = read_checkpoint(folder)
    if (router is not None or alignment is not None) and not checkpoint.routers:
        raise RemoeError(f"{folder}: has no router tensors: it is not a Mixture-of-Experts model")
    if router is not None:
        _check_router(checkpoint, router)
    chosen = quant.upper() if quant is not None else _own_type(checkpoint)
    intermediate = None
    if chosen not in _DIRECT:
        # What gpt-oss has; the converter leaves them as they are.
        if any(key.endswith("_blocks") for key in checkpoint.tensors):
            raise RemoeError(
                f"{folder}: its experts are MXFP4 already, which {chosen} would only worsen; leave --quant out"
            )
        intermediate = "F32" if checkpoint.is_float32 else "BF16"
    final = _size(checkpoint, chosen)
    first = _size(checkpoint, intermediate) if intermediate else 0
    copy = final if router is not None or alignment is not None else 0
    plan = HfPlan(checkpoint, output, chosen, intermediate, router, alignment, final, final + max(first, copy))
    parent = output.resolve().parent
    free = shutil.disk_usage(parent).free
    if plan.disk_bytes > free:
        raise RemoeError(
            f"{parent}: has {format_size(free)} free, but the conversion needs about {format_size(plan.disk_bytes)}; "
            "free some space or choose another folder"
        )
    return plan


def from_hf(
    folder: Path,
    output: Path,
    *,
    quant: str | None = None,
    router: Path | None = None,
    alignment: int | None = None,
    force: bool = False,
    report: Report = silent,
) -> HfPlan:
    """Write the GGUF that `plan_from_hf` plans, whole or not at all, and return the plan.

    Raises RemoeError as it does, where torch or transformers are missing, and with the converter's last words.
    """
    plan = plan_from_hf(folder, output, quant=quant, router=router, alignment=alignment, force=force)
    _check_packages(folder)
    report("Looking for llama.cpp's converter", None)
    llama_cpp = vendored_converter(load_pin(patches_dir()))
    quantizer = ensure_runtime(report=report).bin_dir / "llama-quantize" if plan.intermediate else None
    more = router is not None or alignment not in (None, GGUF_DEFAULT_ALIGNMENT)
    with ExitStack() as files:
        target = files.enter_context(scratch_file(output) if more else atomic_output(output, force=force))
        if quantizer is None:
            _convert(plan, llama_cpp, plan.quant, target, report)
        else:
            assert plan.intermediate is not None
            with scratch_file(output) as plain:
                _convert(plan, llama_cpp, plan.intermediate, plain, report)
                _quantize(plan, quantizer, plain, target, report)
        # Reading it back checks every offset against the file's size.
        read_layout(target)
        if more:
            convert(
                target,
                router,
                output,
                alignment=alignment,
                force=force,
                progress=lambda done, total: report("Writing the output", done / total),
            )
    return plan


def _weights(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files, complete, each with the keys that the index places there, or an empty list."""
    if (folder / INDEX_NAME).exists():
        files = read_index(folder / INDEX_NAME)
        if not files:
            raise RemoeError(f"{folder / INDEX_NAME}: names no file; download it again")
    else:
        # The converter takes what is named so, and without an index cannot tell whether a part is missing.
        found = weight_files(folder, "model*.safetensors")
        files = {path: [] for path in found}
        for match in filter(None, (_PART.fullmatch(path.name) for path in found)):
            for number in range(1, int(match["count"]) + 1):
                files.setdefault(folder / f"model-{number:05d}-of-{match['count']}.safetensors", [])
    missing = sorted(path for path in files if not path.is_file())
    if missing:
        raise RemoeError(f"{missing[0]}: is missing ({len(missing)} of {len(files)} files are); download it")
    return files


def _check_json(path: Path) -> None:
    if path.exists():
        source = Source.of(path)
        if source.size > MAX_INDEX_BYTES:
            raise RemoeError(f"{path}: has {source.size} bytes, expected at most {MAX_INDEX_BYTES}")
        with source.open() as descriptor:
            parse_object(source, source.read(descriptor, 0, source.size))


def _check_router(checkpoint: Checkpoint, path: Path) -> None:
    """`convert` checks this again, but hours later."""
    router = read_router(path)
    for name, tensor in router.tensors.items():
        expected = checkpoint.routers.get(name)
        if expected is None:
            raise RemoeError(f"{path}: has {name} ('{tensor.key}'), which the model in {checkpoint.folder} has not")
        if tensor.shape != expected:
            raise RemoeError(
                f"{path}: tensor '{tensor.key}' has shape {list(tensor.shape)}, expected {list(expected)} as in "
                f"{checkpoint.folder}"
            )
    if missing := [name for name in checkpoint.routers if name.endswith(".weight") and name not in router.tensors]:
        raise RemoeError(f"{path}: has no {missing[0]}, which the model in {checkpoint.folder} has")


def _own_type(checkpoint: Checkpoint) -> str:
    types = [tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) >= 2]
    return "BF16" if "BF16" in types else "F16"


def _size(checkpoint: Checkpoint, quant: str) -> int:
    return int(checkpoint.parameters * QUANTS[quant] / 8 * _OVERHEAD) + _METADATA_BYTES


def _check_packages(folder: Path) -> None:
    needed = ["torch", "transformers"]
    if (folder / "tokenizer.model").is_file():
        needed.append("sentencepiece")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise RemoeError(f"converting a checkpoint needs {' and '.join(missing)}: pip install 'remoe-edge[tune]'")


def _convert(plan: HfPlan, llama_cpp: Path, quant: str, target: Path, report: Report) -> None:
    # The converter fills templates in the name.
    outfile = target.with_name(target.name.replace("{", "{{").replace("}", "}}"))
    command: list[str | Path] = [sys.executable, "-m", "remoe_edge.gguf_io.hf_converter", llama_cpp]
    command += [plan.checkpoint.folder.resolve(), "--outtype", quant.lower(), "--outfile", outfile]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("NO_LOCAL_GGUF", None)

    def follow(line: bytes) -> bool:
        if match := _CONVERTER_PROGRESS.match(line):
            report(f"Converting to {quant}", int(match[1]) / 100)
        return match is not None

    report(f"Converting to {quant}", 0.0)
    _run(command, follow, f"{plan.checkpoint.folder}: llama.cpp's converter", environment, llama_cpp)


def _quantize(plan: HfPlan, quantizer: Path, plain: Path, target: Path, report: Report) -> None:
    def follow(line: bytes) -> bool:
        if match := _QUANTIZER_PROGRESS.match(line):
            report(f"Quantizing to {plan.quant}", int(match[1]) / int(match[2]))
        return match is not None

    report(f"Quantizing to {plan.quant}", 0.0)
    _run(
        [quantizer, plain, target, plan.quant],
        follow,
        f"{plan.checkpoint.folder}: llama-quantize",
        dict(os.environ),
        plain.parent,
    )


def _run(
    command: Sequence[str | Path],
    follow: Callable[[bytes], bool],
    what: str,
    environment: dict[str, str],
    folder: Path,
) -> None:
    """Run a program in `folder` and give each line to `follow`, which says whether it was but progress."""
    last: deque[bytes] = deque(maxlen=_LINES_SHOWN)
    with child_process(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        for line in _lines(process.stdout.fileno()):
            if not follow(line) and line.strip():
                last.append(line.rstrip())
        process.wait()
    if process.returncode == 0:
        return
    lines = [line.decode(errors="replace") for line in last]
    if process.returncode == REFUSED and lines:
        raise RemoeError(f"{what.partition(': ')[0]}: {lines[-1]}")
    hint = "; the machine may have run out of memory" if process.returncode == -9 else ""
    said = "\n".join(f"  {line}" for line in lines)
    raise RemoeError(f"{what} failed with status {process.returncode}{hint}; its last lines:\n{said}")


def _lines(descriptor: int) -> Iterator[bytes]:
    """Lines as they come, also those that a carriage return ends."""
    unread = b""
    while data := os.read(descriptor, 1 << 16):
        *lines, unread = _ENDS.split(unread + data)
        yield from lines
    yield unread
