"""A process whose reads of a model fail: run by test_runtime_faults.py with faulty_reads.c preloaded.

    python reads_under_faults.py MODEL CONTROL IO PHASE

Every read of a decode or of a prefill fails in turn. Prints what was tried as one JSON object; an AssertionError says
what was not as promised.
"""

import json
import mmap
import os
import re
import struct
import sys
from collections import Counter
from itertools import count
from pathlib import Path

from gguf import GGUFReader

from remoe_edge.runtime.llama import CacheConfig, RuntimeReadError, Session, open_model

KINDS = ("EIO", "ENOMEM", "EINTR", "zero", "short", "slow", "wrong")
STEPS = {"decode": [[11], [23]], "prefill": [[10, 21, 32, 43, 54, 15, 26, 37]]}
CONTROL = struct.Struct("<QQiiiii")
_ERROR = re.compile(r"status -3: (.*): cannot read tensor (\S+), expert (\d+), offset (\d+), (\d+) bytes: (.*)")


class Faults:
    """The control file of faulty_reads.c, for one model file."""

    def __init__(self, control: Path, model: Path) -> None:
        status = os.stat(model)
        self._id = (status.st_dev, status.st_ino)
        with control.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), CONTROL.size)
        self.clear()

    def arm(self, kind: str, at: int, persistent: bool) -> None:
        self._memory[:] = CONTROL.pack(*self._id, KINDS.index(kind), at, persistent, 0, 0)

    def clear(self) -> None:
        self.arm(KINDS[0], -1, False)

    @property
    def reads(self) -> int:
        """Reads of the model since `arm`."""
        return int(CONTROL.unpack(self._memory[:])[-2])

    @property
    def fired(self) -> int:
        return int(CONTROL.unpack(self._memory[:])[-1])


def reason(kind: str, persistent: bool) -> str | None:
    """How an error begins that must come; None: there must be none."""
    return {
        "EIO": "Input/output error",
        "ENOMEM": "Cannot allocate memory",
        "EINTR": "Interrupted system call" if persistent else None,
        "zero": "storage stopped after ",
        "wrong": "the bytes are not those that were there when the model was loaded, twice" if persistent else None,
    }.get(kind)


def request(session: Session, phase: str) -> bytes:
    session.clear()
    for tokens in STEPS[phase]:
        session.decode(tokens, all_logits=True)  # else the last layer would compute one token only
    return session.all_logits().tobytes()


def failed_request(session: Session, phase: str) -> str | None:
    try:
        request(session, phase)
    except RuntimeReadError as error:
        return str(error)
    return None


def check_error(text: str, model: Path, tensors: dict[str, tuple[int, int]], begins: str) -> None:
    """It names a slice of the file as the file has it."""
    match = _ERROR.search(text)
    assert match, text
    path, tensor, expert, offset, size, why = match.groups()
    start, slice_size = tensors[tensor]
    assert path == str(model), text
    assert (int(offset), int(size)) == (start + int(expert) * slice_size, slice_size), text
    assert why.startswith(begins), text


def main(model: Path, control: Path, io: str, phase: str) -> dict[str, object]:
    faults = Faults(control, model)
    tensors = {
        tensor.name: (tensor.data_offset, tensor.n_bytes // int(tensor.shape[2]))
        for tensor in GGUFReader(model).tensors
        if "_exps" in tensor.name
    }
    with open_model(model, n_ctx=64, n_threads=1, mmap=False, repack=False) as resident:
        expected = request(resident, phase)

    tried: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for verify in (False, True):
        cache = CacheConfig("2s" if phase == "decode" else "3s", io=io, verify=verify)
        with open_model(model, cache, n_ctx=64, n_threads=1, repack=False) as session:
            assert request(session, phase) == expected
            for kind in ("EIO", "wrong") if verify else KINDS[:-1]:
                for persistent in (False, True):
                    begins = reason(kind, persistent)
                    # A direct read cannot go on from the middle of a block, so this one may end or not.
                    open_end = kind == "short" and persistent
                    for at in count():
                        faults.arm(kind, at, persistent)
                        error = failed_request(session, phase)
                        fired = faults.fired
                        if error and open_end:
                            check_error(error, model, tensors, "storage stopped after ")
                        elif error:
                            assert fired, error
                            assert begins, error
                            check_error(error, model, tensors, begins)
                            # As long as the fault is there it says so again.
                            assert not persistent or failed_request(session, phase), (kind, at)
                        else:
                            assert not (fired and begins), (kind, persistent, at)
                        faults.clear()
                        assert request(session, phase) == expected, (kind, persistent, at)
                        if not fired:
                            break
                        tried[kind] += 1
                        errors[kind] += error is not None
            if verify:
                stats = session.stats()
                assert stats is not None
                assert stats.reads_wrong >= tried["wrong"]
    return {"tried": tried, "errors": errors}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])))
