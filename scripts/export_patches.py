"""Write patches/*.patch anew from a llama.cpp work tree (a git repository whose HEAD is the pinned, unpatched source).

    python scripts/export_patches.py TREE          # own sources and hooks were edited in TREE
    python scripts/export_patches.py TREE --check  # exit 1 if the patches differ from the tree

Own sources are copied back to patches/sources, hooks become one patch for each part of llama.cpp. The text above the
first `diff --git` of a patch (why it exists, when it can go) is kept.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PATCHES = Path(__file__).parent.parent / "patches"

PARTS = {
    "ggml-cpu-expert-source.patch": ["ggml/include", "ggml/src/ggml-cpu"],
    "ggml-cuda-expert-slots.patch": ["ggml/src/ggml-cuda"],
    "llama-expert-cache.patch": ["src", "include"],
    "tools-expert-flags.patch": ["common", "tools/llama-bench"],
    "tools-server-expert.patch": ["tools/server"],
}


def git(tree: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(tree), *args], check=True, capture_output=True, text=True).stdout


def wanted(tree: Path) -> dict[Path, str]:
    """Every file of patches/ that the tree determines, with its content."""
    own = [path.relative_to(PATCHES / "sources") for path in (PATCHES / "sources").rglob("*") if path.is_file()]
    files = {PATCHES / "sources" / name: (tree / name).read_text() for name in own}
    for name, parts in PARTS.items():
        path = PATCHES / name
        header = path.read_text().split("diff --git ")[0] if path.exists() else ""
        files[path] = header + git(tree, "diff", "--no-color", "--no-ext-diff", "--diff-filter=M", "HEAD", "--", *parts)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = [path for path, text in wanted(args.tree).items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(path.relative_to(PATCHES.parent))
    if args.check:
        return 1 if stale else 0
    for path, text in wanted(args.tree).items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
