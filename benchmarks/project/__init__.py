"""The Django project of the benchmarks: one ordinary model, and a queue on it."""
