"""GGUF files: llama.cpp's file format for models. The table of architectures serves reading and writing."""
