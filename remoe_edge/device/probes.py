"""Whether this kernel, here and for this user, does what the expert cache would like: tried, not looked up."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from pathlib import Path

from remoe_edge.device.sysfs import number

# Numbers of system calls, equal on x86-64 and arm64, and of <linux/io_uring.h>.
_IO_URING_SETUP, _IO_URING_REGISTER = 425, 427
_REGISTER_PROBE, _OP_READ, _OP_SUPPORTED = 8, 22, 1
_PARAMS_BYTES, _PROBE_OPS = 120, 64
_PAGE = 4096


def probe_direct(path: Path) -> str | None:
    """None if `path` can be read with O_DIRECT; else why not. The file needs one byte at least."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "this filesystem has no O_DIRECT"
        return str(error)
    try:
        with mmap.mmap(-1, _PAGE) as buffer:
            return None if os.preadv(descriptor, [buffer], 0) else "the file is empty"
    except OSError as error:
        return f"a direct read failed: {error.strerror}"
    finally:
        os.close(descriptor)


def probe_io_uring(root: Path = Path("/")) -> str | None:
    """None if a ring can be made and knows reads; else why not. `root` only says where to look up the reason."""
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(_IO_URING_SETUP, 1, ctypes.create_string_buffer(_PARAMS_BYTES))
    if ring < 0:
        return _refusal(ctypes.get_errno(), root)
    try:
        # struct io_uring_probe: last_op, ops_len, 14 bytes; then for each operation its number, 1 byte, u16 flags, u32.
        probe = ctypes.create_string_buffer(16 + 8 * _PROBE_OPS)
        if libc.syscall(_IO_URING_REGISTER, ring, _REGISTER_PROBE, probe, _PROBE_OPS) < 0:
            return "the kernel's io_uring is older than Linux 5.6"
        (flags,) = struct.unpack_from("=H", probe, 16 + 8 * _OP_READ + 2)
        return None if flags & _OP_SUPPORTED else "the kernel's io_uring has no read"
    finally:
        os.close(ring)


def _refusal(error: int, root: Path) -> str:
    if error == errno.ENOSYS:
        return "the kernel has no io_uring"
    disabled = number(root / "proc/sys/kernel/io_uring_disabled")
    if error == errno.EPERM and disabled:
        return f"kernel.io_uring_disabled is {disabled}"
    if error == errno.EPERM:
        return "not permitted; container runtimes forbid it by default"
    return os.strerror(error)
