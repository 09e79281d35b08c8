"""Models and tokenizers from a Hugging Face folder or hub id, with errors that say what to do; never their code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.router import INDEX_NAME

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id. Raises RemoeError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=Path(model).is_dir(), trust_remote_code=False)
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
        Keep the experts in host memory, for models larger than the GPU's; a layer's experts are copied there when it
        computes, and again in the backward pass, so this turns `gradient_checkpointing` on.

    With several processes each loads onto its own GPU. Checkpoints in MXFP4 (gpt-oss) and FP8 (DeepSeek-V3) become
    BF16: their kernels have no backward pass. Raises RemoeError, naming the file, for a folder that is incomplete, and
    for a model without support here.
    """
    local = Path(model).is_dir()
    if local:
        _check_folder(Path(model))
    chosen: Any = DTYPES.get(dtype, "auto")
    placement: Any = None
    config = _config(model, local)
    if torch.cuda.is_available():
        state = PartialState()
        if experts_on_cpu and state.num_processes > 1:
            raise RemoeError("--experts-on-cpu works in one process; start without torchrun, or leave it out")
        placement = {"": state.local_process_index}
        if experts_on_cpu:
            placement |= dict.fromkeys(_experts(config), "cpu")
    elif dtype == "auto":
        chosen = torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=chosen,
            device_map=placement,
            local_files_only=local,
            # Neither code from the model's folder nor a pickle, which can hold some.
            trust_remote_code=False,
            use_safetensors=True,
            **_dequantise(model, config),
            # Loops over experts are slow in training; this form computes the same.
            experts_implementation="grouped_mm",
        )
    except torch.OutOfMemoryError as error:
        raise RemoeError(f"{model}: does not fit into the accelerator's memory; use --experts-on-cpu") from error
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        raise RemoeError(f"{model}: cannot be loaded: {_first_line(error)}") from error
    if gradient_checkpointing or experts_on_cpu:
        # Renamed in transformers 5.
        enable = getattr(loaded, "activation_checkpointing_enable", None) or loaded.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return loaded


def _config(model: str, local: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(model, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RemoeError(f"{model}: has no configuration that can be loaded: {_first_line(error)}") from error


def _experts(config: Any) -> list[str]:
    """Names of the modules that hold the experts of one layer each."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        empty = auto.from_config(config)
    return [name for name, _ in empty.named_modules() if name.endswith(".experts")]


def _dequantise(model: str, config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` that make weights of a quantised checkpoint ones with a backward pass."""
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised is None:
        return {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if method == "fp8":
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    raise RemoeError(f"{model}: is quantised ({method}), which cannot be tuned; give the checkpoint it was made from")


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
