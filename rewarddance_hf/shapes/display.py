"""How far the stages of a run are: a live display in a terminal, else plain lines."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO


class Display:
    """
    Show what is running and what has ended, with times.

    In a terminal each running stage has a bar, and each that has ended a line. Elsewhere (pipes, CI) there is one line for the
    start and the end of each stage, and no control character. `costs` says by name how long stages take, compared with each
    other, or is 0 where nobody knows; once a tenth of all is done, the line of a stage that has ended says about how long the
    others will take.
    """

    def __init__(self, stream: TextIO, costs: Mapping[str, float]) -> None:
        self.stream = stream
        self.costs = costs
        self.cost_done = 0.0
        self.num_finished = 0
        self.start_time = time.monotonic()
        self._titles: dict[str, str] = {}
        self._bars: dict[str, Any] = {}
        self._progress: Any = None
        if stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            console = Console(file=stream, highlight=False)
            if console.is_terminal and not console.is_dumb_terminal:
                columns = (
                    TextColumn("[cyan]{task.description}"),
                    BarColumn(24),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                )
                self._progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> "Display":
        if self._progress is not None:
            self._progress.start()
            self._bars[""] = self._progress.add_task("all stages", total=len(self.costs))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def start(self, name: str, title: str) -> None:
        """A stage begins."""
        self._titles[name] = title
        if self._progress is None:
            self._write(f"started   {title}")
        else:
            self._bars[name] = self._progress.add_task(title, total=None)

    def show(self, name: str, done: int, total: int) -> None:
        """A stage has done so much of all."""
        if self._progress is not None:
            self._progress.update(self._bars[name], completed=done, total=total)

    def finish(self, name: str, seconds: float) -> None:
        """A stage has ended."""
        self.num_finished += 1
        self.cost_done += self.costs[name]
        total = sum(self.costs.values())
        share = self.cost_done / total if total else 0.0
        text = f"{self._titles[name]} ({minutes(seconds)})"
        if 0.1 <= share < 1:
            text += f", {minutes((time.monotonic() - self.start_time) * (1 - share) / share)} left"
        if self._progress is None:
            self._write(f"finished  {text}")
        else:
            self._progress.remove_task(self._bars.pop(name))
            self._progress.update(self._bars[""], completed=self.num_finished)
            self._progress.console.print(f"[green]done[/] {text}")

    def _write(self, text: str) -> None:
        self.stream.write(f"[{minutes(time.monotonic() - self.start_time)}] {text}\n")
        self.stream.flush()


def minutes(seconds: float) -> str:
    """A time as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
