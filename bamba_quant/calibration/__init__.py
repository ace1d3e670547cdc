"""Measures and improves what files keep of a model: importance matrices, allocation of bits, tuned rounding."""
