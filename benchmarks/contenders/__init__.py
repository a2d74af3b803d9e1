"""What each contender does, run in its own environment: `python -m benchmarks.contenders MODULE FUNCTION`.

Each module has the same functions:

* ``create()`` makes its tables, empty;
* ``enqueue(count)`` adds so many tasks that are due, as fast as it can, and returns when they are committed;
* ``enqueue_singly(count)`` adds them one at a time, each committed by itself;
* ``work()`` is its worker, or one process of it.

Those for how soon a task is begun, ``pickup_...``, have instead of the second and the third

* ``feed()``, which adds a task each time it is told to, and says when that was committed.
"""
