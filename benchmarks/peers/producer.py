"""Puts a task into a queue each time it is told to, and says when that was committed.

python -m benchmarks.peers.producer benchmarks.peers.with_modelqueue
"""

from __future__ import annotations

import sys
import time
from importlib import import_module


def main() -> None:
    """Enqueue a task of the queue with the number that each line of the input has."""
    enqueue = import_module(sys.argv[1]).enqueuer()
    for line in sys.stdin:
        enqueue(int(line))
        print(time.time(), flush=True)


if __name__ == "__main__":
    main()
