"""Progress of long work, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

Report = Callable[[str, float | None], None]
"""Called with what is being done and, where known, the part of it that is complete, from 0 to 1."""


def silent(_stage: str, _fraction: float | None) -> None:
    """A Report that shows nothing."""


@contextmanager
def stderr_progress() -> Iterator[Report]:
    """A Report for people: a bar with the time left on a terminal, elsewhere a line per stage and per 10 %."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: tuple[str, int] | None = None

    def __call__(self, stage: str, fraction: float | None) -> None:
        tenths = int((fraction or 0) * 10)
        if self._last == (stage, tenths):
            return
        self._last = (stage, tenths)
        part = "" if fraction is None else f" {tenths * 10} %"
        self._console.print(f"{stage}{part}", markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """A stage that begins where the last one ended is part of the same work: the bar, and its time left, go on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stage = ""
        self._task: TaskID | None = None
        self._fraction: float | None = None

    def __call__(self, stage: str, fraction: float | None) -> None:
        if self._task is None or (stage != self._stage and not self._goes_on(fraction)):
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(stage, total=None if fraction is None else 1.0)
        elif stage != self._stage:
            self._progress.update(self._task, description=stage)
        self._stage, self._fraction = stage, fraction
        if fraction is not None:
            self._progress.update(self._task, completed=fraction)

    def _goes_on(self, fraction: float | None) -> bool:
        return None not in (fraction, self._fraction) and 0 < (self._fraction or 0) <= (fraction or 0) < 1
