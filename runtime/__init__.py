"""Run a GGUF in llama.cpp: one base, live adapters, the right one answering. Imports no torch and no converters."""
