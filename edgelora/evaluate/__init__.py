"""Scores and reports. Asks for callables and Protocols; knows neither torch nor llama.cpp."""
