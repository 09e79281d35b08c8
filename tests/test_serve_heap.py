"""A server's memory must not grow with the requests it has answered."""

import subprocess
import sys

import pytest

# Blocks as asyncio takes them: large, shrunk to what came, some of which outlives the next one.
PROGRAM = """
import ctypes, sys
from remoe_edge.serve.heap import keep_heap_compact

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "compact":
    assert keep_heap_compact()
libc.free(libc.malloc(1 << 20))
before = libc.mallinfo2()
blocks = [libc.malloc(1 << 18) for _ in range(32)]
after = libc.mallinfo2()
print(after.hblks - before.hblks, after.uordblks - before.uordblks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="an allocator of Linux")
@pytest.mark.parametrize(("mode", "mapped"), [("compact", 32), ("as it is", 0)])
def test_large_blocks_stay_out_of_the_heap(mode: str, mapped: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) == mapped, done.stdout
