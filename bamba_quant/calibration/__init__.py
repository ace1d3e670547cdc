"""What was measured of a model's activations: importance matrices."""

from bamba_quant.checkpoint.imatrix import MAY_BE_MISSING, Imatrix, PlaceholderImatrix, read_imatrix

__all__ = ["MAY_BE_MISSING", "Imatrix", "PlaceholderImatrix", "read_imatrix"]
