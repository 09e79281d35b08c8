"""The GGUF of whatever names a model: one already, a Hugging Face folder, or a base with a tuned router."""

from __future__ import annotations

from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.convert import convert
from remoe_edge.progress import Report, silent


def is_gguf(path: Path) -> bool:
    """By its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def base_gguf(base: Path, folder: Path, *, quant: str | None = None, report: Report = silent) -> Path:
    """`base` itself, or `folder`/base.gguf made of a checkpoint folder, unless one is there that is newer."""
    if is_gguf(base):
        return base
    if not base.is_dir():
        raise RemoeError(f"{base}: is neither a GGUF nor the folder of a Hugging Face checkpoint")
    from remoe_edge.gguf_io.from_hf import from_hf

    output = folder / f"base{f'-{quant.lower()}' if quant else ''}.gguf"
    if not _fresh(output, base / "config.json", *base.glob("*.safetensors")):
        from_hf(base, output, quant=quant, force=True, report=report)
    return output


def tuned_gguf(base: Path, tuned: Path, folder: Path, *, report: Report = silent) -> Path:
    """`tuned` itself, or a copy of the GGUF `base` with the router in `tuned`, a file or checkpoint folder."""
    if is_gguf(tuned):
        return tuned
    output = folder / f"{tuned.stem if tuned.is_file() else tuned.name}.gguf"
    sources = [tuned] if tuned.is_file() else list(tuned.glob("*.safetensors"))
    if not _fresh(output, base, *sources):
        convert(base, tuned, output, force=True, progress=lambda done, total: report("writing the GGUF", done / total))
    return output


def _fresh(output: Path, *sources: Path) -> bool:
    return output.is_file() and all(source.stat().st_mtime_ns <= output.stat().st_mtime_ns for source in sources)
