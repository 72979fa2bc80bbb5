"""Functions that change a live model: quantize_, requantize_, dequantize_, and what they share."""
