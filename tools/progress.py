"""One line that says how far a notebook is."""

import sys
import time

PLAIN_INTERVAL = 15  # seconds between lines where a line cannot be overwritten


class Progress:
    """Shows `title: cell i/n, 12 s`; on a terminal in place, elsewhere as a new line every 15 seconds."""

    def __init__(self, title: str, total: int):
        self._title, self._total = title, total
        self._in_place = sys.stdout.isatty()

    def __enter__(self) -> "Progress":
        self._started = self._last = time.monotonic()
        if not self._in_place:
            print(f"{self._title}: executing {self._total} code cells", flush=True)
        return self

    def __exit__(self, *_) -> None:
        if self._in_place:
            print("\r\033[K", end="", flush=True)

    def show(self, number: int) -> None:
        """Say that code cell `number` starts."""
        now = time.monotonic()
        line = f"{self._title}: cell {min(number, self._total)}/{self._total}, {now - self._started:.0f} s"
        if self._in_place:
            print(f"\r\033[K{line}", end="", flush=True)
        elif now - self._last >= PLAIN_INTERVAL:
            self._last = now
            print(line, flush=True)
