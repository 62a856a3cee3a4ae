"""To GGUF: standalone adapters, merged models, quantized files. Never imports `runtime`; files pass between them."""
