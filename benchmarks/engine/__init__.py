"""What the live engine costs and saves: the parts of benchmarks/live.py.

llama.cpp is imported in functions: the process that starts a measurement has none of it, nor its threads.
"""
