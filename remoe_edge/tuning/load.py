"""Models and tokenizers from a Hugging Face folder or hub id, with errors that say what to do; never their code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.router import INDEX_NAME

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id. Raises RemoeError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=Path(model).is_dir())
    except (OSError, ValueError) as error:
        raise RemoeError(f"{model}: has no tokenizer that can be loaded: {_first_line(error)}") from error


def load_model(
    model: str, *, dtype: str = "auto", experts_on_cpu: bool = False, gradient_checkpointing: bool = False
) -> Any:
    """A causal language model, on the GPU if there is one.

    Parameters
    ----------
    dtype
        "auto": as in the checkpoint; on a CPU without bfloat16 instructions it is slow, so there it is float32.
    experts_on_cpu
        Keep the experts in host memory and compute everything else on the GPU, for models larger than its memory.

    Raises RemoeError, naming the file, for a folder that is incomplete, and for a model without support here.
    """
    local = Path(model).is_dir()
    if local:
        _check_folder(Path(model))
    chosen: Any = DTYPES.get(dtype, "auto")
    placement: Any = None
    if torch.cuda.is_available():
        placement = {"": 0}
        if experts_on_cpu:
            placement = _experts_on_cpu(model, local)
    elif dtype == "auto":
        chosen = torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=chosen,
            device_map=placement,
            local_files_only=local,
            # Loops over experts are slow in training; this form computes the same.
            experts_implementation="grouped_mm",
        )
    except torch.OutOfMemoryError as error:
        raise RemoeError(f"{model}: does not fit into the accelerator's memory; use --experts-on-cpu") from error
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        raise RemoeError(f"{model}: cannot be loaded: {_first_line(error)}") from error
    if gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    return loaded


def _experts_on_cpu(model: str, local: bool) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(model, local_files_only=local)
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        empty = auto.from_config(config)
    placement: dict[str, Any] = {"": 0}
    placement |= {name: "cpu" for name, _ in empty.named_modules() if name.endswith(".experts")}
    return placement


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise RemoeError(f"{folder}: has no config.json; give the folder of a Hugging Face checkpoint")
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise RemoeError(f"{index}: is no index of safetensors files") from error
        missing = sorted(str(name) for name in names if not (folder / str(name)).is_file())
        if missing:
            raise RemoeError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(names)} files); download it")
    elif not list(folder.glob("*.safetensors")):
        raise RemoeError(f"{folder}: has no .safetensors file")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
