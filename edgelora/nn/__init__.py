"""The decoder and its parts, written for training with frozen weights: nothing is saved that is not needed."""
