"""GGUF blocks dequantized on a GPU, in Triton, to numpy's values bit for bit."""
