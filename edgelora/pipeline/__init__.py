"""The roof: end-to-end runs that need torch, converters and llama.cpp together. Only `cli/` imports it."""
