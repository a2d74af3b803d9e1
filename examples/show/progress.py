"""How far the queue is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """Shows how many tasks are done, and lets other lines be printed meanwhile."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._started = time.monotonic()
        self._done = -1
        self._bar = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=" files", file=sys.stdout, smoothing=0.1, dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def show(self, tally: dict[str, int]) -> None:
        done = tally["finished"] + tally["canceled"]
        states = ", ".join(f"{count:,} {state}" for state, count in tally.items() if count)
        if self._bar is not None:
            self._bar.set_postfix_str(states, refresh=False)
            self._bar.update(done - self._bar.n)
        elif done * 10 // self._total > self._done * 10 // self._total:
            self.say(f"{done * 100 // self._total:3} %  {states}")
            self._done = done

    def say(self, text: str) -> None:
        line = f"{self.seconds:5.1f} s  {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
