"""Puts a CUDA 13.2 cross toolkit for Jetson together from wheels: python jetson/toolchain/cuda_toolkit.py FOLDER

`remoe-edge build --target jetson` does the same in its cache; this is for other builds with aarch64.cmake.
"""

import sys
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.jetson.cuda_toolkit import assemble
from remoe_edge.progress import stderr_progress

if len(sys.argv) != 2:
    sys.exit(__doc__)
try:
    with stderr_progress() as report:
        assemble(Path(sys.argv[1]), report)
except (RemoeError, OSError) as error:
    sys.exit(f"Error: {error}")
