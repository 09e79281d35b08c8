"""Cold page caches, so that every decode run begins with the same one."""

import os
from collections.abc import Iterable
from pathlib import Path

_DROP = Path("/proc/sys/vm/drop_caches")


def drop_page_cache(files: Iterable[Path], *, control: Path = _DROP) -> str:
    """Drop what the page cache holds: all of it where permitted, else the pages of `files` that nothing maps.

    Returns "dropped", "file dropped", or "warm" where neither is possible.
    """
    os.sync()  # only clean pages can be dropped
    try:
        control.write_text("1")
    except OSError:
        pass
    else:
        return "dropped"
    try:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    except OSError:
        return "warm"
    return "file dropped"
