"""How well each method learns: the parts of benchmarks/methods.py."""
