"""Compile the CUDA sources that the patches touch, with llama.cpp's own flags, for sm_87 and sm_90. No GPU is needed.

python scripts/check_cuda_compiles.py --toolkit DIR  # a toolkit of jetson/toolchain/cuda_toolkit.py; 2 to 10 minutes
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from remoe_edge.runtime.patch import apply_patches
from remoe_edge.runtime.pin import load_pin, patches_dir
from remoe_edge.runtime.sdist import fetch_sdist, unpack
from remoe_edge.runtime.toolchain import find_tool

TOOLCHAIN = Path(__file__).parent.parent / "jetson" / "toolchain" / "aarch64.cmake"
SOURCES = ("experts.cu", "ggml-cuda.cu")
ARCHITECTURES = "87-real;90-real"
OFF = ("GGML_NATIVE", "GGML_CUDA_NCCL", "GGML_CCACHE", "LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS")
OFF += ("LLAMA_BUILD_SERVER", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_COMMON")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toolkit", type=Path, required=True)
    parser.add_argument("--toolchain", type=Path, default=TOOLCHAIN, help="CMake file, default: jetson/toolchain's")
    args = parser.parse_args()
    if not (args.toolkit / "bin" / "nvcc").exists():
        print(
            f"Error: {args.toolkit} holds no bin/nvcc; python jetson/toolchain/cuda_toolkit.py makes one",
            file=sys.stderr,
        )
        return 1
    patches = patches_dir()
    with tempfile.TemporaryDirectory() as temporary:
        tree, build = Path(temporary, "vendor", "llama.cpp"), Path(temporary, "build")
        unpack(fetch_sdist(load_pin(patches)), Path(temporary))
        apply_patches(patches, tree)
        ninja = find_tool("ninja")
        configure = [str(find_tool("cmake")), "-S", str(tree), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_TOOLCHAIN_FILE={args.toolchain.absolute()}"]
        configure += [f"-DREMOE_CUDA_TOOLKIT={args.toolkit.absolute()}", f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURES}"]
        configure += ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_CUDA=ON", *(f"-D{name}=OFF" for name in OFF)]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        for source in SOURCES:
            start = time.monotonic()
            made = f"ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir/{source}.o"
            subprocess.run([str(ninja), "-C", str(build), "-j1", made], check=True, stdout=subprocess.DEVNULL)
            size = (build / made).stat().st_size
            print(f"{source}: compiled for {ARCHITECTURES}, {size} bytes, {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
