"""Open a base model: files → frozen weights → a decoder. `ggml` and `fingerprint` import no torch."""
