"""Containers on disk: GGUF, safetensors headers, bounded binary reading. Nothing here knows about quantization."""
