"""Adapters: in memory, on disk (PEFT's two files and `edgelora.json`), and on a built model."""
