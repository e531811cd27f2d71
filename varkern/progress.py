"""The progress bar of all long work."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(quiet: bool = False) -> Progress:
    """What, how far, a word on it (the task's field ``note``), time spent and left; ``quiet``: shows nothing.

    To be told here, not in a bar that has begun: one that is silenced then is never stopped, and its thread goes on.
    """
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=quiet,
    )
