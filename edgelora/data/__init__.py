"""From a file of conversations to packed batches: formats → messages → token ids + loss mask → batches (numpy)."""
