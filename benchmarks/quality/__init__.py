"""How good quantized models are: perplexity and divergence of every format, with and without importance and search."""
