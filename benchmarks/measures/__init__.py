"""One module for each measure; each has `measure(bench)`, which returns its tables."""
