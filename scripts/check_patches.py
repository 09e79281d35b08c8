"""Check that patches/ fits the pinned source in git's eyes, too, and that our applier makes the tree that git makes."""

import filecmp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from remoe_edge.runtime.patch import apply_patches
from remoe_edge.runtime.pin import load_pin, patch_files, patches_dir
from remoe_edge.runtime.sdist import fetch_sdist, unpack


def main() -> int:
    patches = patches_dir()
    with tempfile.TemporaryDirectory() as temporary:
        trees = [Path(temporary) / name / "vendor" / "llama.cpp" for name in ("git", "ours")]
        for tree in trees:
            unpack(fetch_sdist(load_pin(patches)), tree.parents[1])
        # Without this git would look for a repository above the tree, and leave out what lies outside of it.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": temporary}
        for patch in patch_files(patches):
            for check in (["--check"], []):
                subprocess.run(["git", "apply", *check, str(patch)], cwd=trees[0], env=environment, check=True)
        changed = apply_patches(patches, trees[1])
        own = {path for path in changed if (patches / "sources" / path).exists()}
        different = [path for path in changed if path not in own and not filecmp.cmp(*(t / path for t in trees), False)]
        print(f"{len(changed) - len(own)} files patched, {len(own)} own files, {len(different)} different from git's")
        return 1 if different or len(own) == len(changed) else 0


if __name__ == "__main__":
    sys.exit(main())
