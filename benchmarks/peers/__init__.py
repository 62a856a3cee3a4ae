"""The sides of `benchmarks/train.py`, each a program of its own: what one imports never weighs on another."""
