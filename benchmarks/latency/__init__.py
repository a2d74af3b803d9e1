"""How soon a worker begins a task: `python -m benchmarks.latency`. Also the app whose queues it serves."""
