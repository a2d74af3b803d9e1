"""How soon a worker begins a task, beside pgqueuer and procrastinate: `make peers`."""
