"""Which way to a quantized fine-tune is better, at which level: the parts of benchmarks/which_way.py."""
