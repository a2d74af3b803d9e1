"""How fast the worker is, beside other queues on the same machine: `make bench`.

The method stands in docs/reference/benchmarks.md.
"""
