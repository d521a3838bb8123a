"""What a command says while it works: messages and progress on stderr and in train.log. stdout is for results."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dinobench.addresses import masked

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from pretrain.training.loop import Progress

SHOWN_WAIT = 0.1
"""Share of the time spent waiting for data from which on a progress line tells it."""
LINE_SECONDS = 5.0
"""Between two progress lines where there is no terminal: Rich would show nothing until the end."""

LOG_BYTES = 10 * 2**20
"""Of train.log, a week of progress lines; then it becomes train.log.1, in place of an earlier one."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, "broken pipe")


class Reporter:
    """Prints messages and progress: a bar on a terminal, plain lines elsewhere. `silent` for ranks other than 0."""

    def __init__(self, *, silent: bool = False, every: float = LINE_SECONDS):
        self.console = _Console(stderr=True, quiet=silent, highlight=False, soft_wrap=True)
        self._silent, self._every = silent, every
        self._file: Path | None = None
        self._last_line = -math.inf
        self._bar: Bar | None = None

    def keep(self, file: Path) -> None:
        """Write a copy of everything to this file from now on."""
        self._file = file

    def say(self, text: str) -> None:
        text = masked(text)
        self._write(text)
        self._print(text)

    def warn(self, text: str) -> None:
        text = masked(f"warning: {text}")
        self._write(text)
        self._print(text, style="bold yellow")

    def progress(self, progress: Progress) -> None:
        """Show where the training stands; called after every step, so it is cheap when nothing is due."""
        due = time.monotonic() - self._last_line >= self._every or progress.step == progress.total_steps
        if self.console.is_terminal and not self.console.quiet:
            with self._while_there():
                self._update_bar(progress)
        if due and not self._silent:
            self._last_line = time.monotonic()
            self._write(progress_line(progress))
            if not self.console.is_terminal:
                self._print(progress_line(progress))

    def close_bar(self) -> None:
        if self._bar is not None:
            with self._while_there():
                self._bar.stop()
            self._bar = None

    def _print(self, text: str, style: str | None = None) -> None:
        with self._while_there():
            self.console.print(text, markup=False, style=style)

    @contextmanager
    def _while_there(self) -> Iterator[None]:
        """Whoever listens may go: a terminal is closed, `| tee` dies. The work goes on, and train.log goes on."""
        try:
            yield
        except OSError as error:
            self.console.quiet = True
            self._write(f"nobody reads stderr any more ({error.strerror}); messages go on here")

    def _update_bar(self, progress: Progress) -> None:
        if self._bar is None:
            from rich import progress as rich_progress

            self._bar = rich_progress.Progress(
                rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.fields[line]}", markup=False),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task("training", total=progress.total_steps, line="")
        self._bar.update(self._bar.task_ids[0], completed=progress.step, line=progress_line(progress))

    def _write(self, text: str) -> None:
        if self._file is None or self._silent:
            return
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {text}\n")
                full = file.tell() >= LOG_BYTES
            if full:
                self._file.replace(self._file.with_name(f"{self._file.name}.1"))
        except OSError as error:
            self._file = None
            self.warn(f"train.log cannot be written any more ({error.strerror}); messages go on here")


def progress_line(progress: Progress) -> str:
    """One line: step 500/10000  epoch 3  loss 5.310  lr 4.9e-04  1820 img/s  eta 2:10."""
    loss = "-" if math.isnan(progress.loss) else f"{progress.loss:.3f}"
    parts = [
        f"step {progress.step}/{progress.total_steps}",
        f"epoch {progress.epoch}",
        f"loss {loss}",
        f"lr {progress.learning_rate:.1e}",
        f"{progress.images_per_second:.0f} img/s",
        f"eta {duration(progress.eta_seconds)}",
    ]
    if progress.data_wait >= SHOWN_WAIT:
        parts.append(f"{100 * progress.data_wait:.0f} % waiting for data")
    return "  ".join([*parts, progress.note] if progress.note else parts)


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
