"""A program: llama.cpp's own converter, ``convert_hf_to_gguf.py``, with two changes to what it does with tokenizers.

``python -m remoe_edge.gguf_io.hf_converter LLAMA_CPP ARGUMENTS...`` runs the one in the folder LLAMA_CPP.

- It knows a tokenizer by the hash of what it makes of one text, so it refuses one that was trained anew, though only
  how text is split before the merges has to be known. That is read from ``tokenizer.json`` here.
- It lets tokenizers run code that lies in the model's folder. Here they never do.

Nothing is fetched: the program is started with the hub switched off.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

REFUSED = 3
"""Exit status where the last line of stderr is the reason, written for people."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

# Expression and whether whole words found in the vocabulary skip the merges, to the name in src/llama-vocab.cpp.
_BY_EXPRESSION = {(_LLAMA3, True): "llama-bpe", (_LLAMA3, False): "dbrx", (_QWEN2, False): "qwen2"}


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a ``tokenizer.json`` splits text before it merges; None if it has no name for that.

    Known are GPT-2's byte-level splitting, and the expressions of Llama 3 and Qwen 2.
    """
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        return None
    # llama.cpp does not normalize text for these.
    if (tokenizer.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        return None
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    whole_words = bool(model.get("ignore_merges"))
    uses_gpt2 = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return "gpt-2" if uses_gpt2 and not whole_words else None
    split = steps[0]
    plain = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    if len(steps) != 2 or uses_gpt2 or not plain:
        return None
    return _BY_EXPRESSION.get((str((split.get("pattern") or {}).get("Regex")), whole_words))


def _change_tokenizers() -> None:
    import transformers
    from conversion.base import TextModel

    load = transformers.AutoTokenizer.from_pretrained

    def load_without_code(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **{**options, "trust_remote_code": False})

    known_name, sentencepiece_vocabulary = TextModel.get_vocab_base_pre, TextModel._create_vocab_sentencepiece

    def name_or_read(self: Any, tokenizer: Any) -> str:
        try:
            return str(known_name(self, tokenizer))
        except NotImplementedError:
            path = Path(self.dir_model) / "tokenizer.json"
            name = pre_tokenizer_name(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
        if name is None:
            print(
                "its tokenizer splits text in a way that llama.cpp has no name for; known are those of released "
                "models, GPT-2's byte-level splitting, and the expressions of Llama 3 and Qwen 2",
                file=sys.stderr,
            )
            # Some models' classes catch every Exception and try something else.
            sys.exit(REFUSED)
        # llama.cpp's default depends on the name.
        ids = tokenizer.encode("a")
        self.gguf_writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
        return name

    def look_before_import(self: Any) -> Any:
        # The same error as without this, where sentencepiece is installed; a tokenizer.json is tried next.
        if not (Path(self.dir_model) / "tokenizer.model").is_file():
            raise FileNotFoundError("tokenizer.model")
        return sentencepiece_vocabulary(self)

    transformers.AutoTokenizer.from_pretrained = load_without_code
    TextModel.get_vocab_base_pre = name_or_read
    TextModel._create_vocab_sentencepiece = look_before_import


def main() -> None:
    """Run the converter of the folder that the first argument names with the other arguments."""
    llama_cpp = Path(sys.argv[1])
    script = str(llama_cpp / "convert_hf_to_gguf.py")
    # Before any import of gguf: the converter needs the one beside it, not the released one.
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    sys.argv = [script, *sys.argv[2:]]
    _change_tokenizers()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
