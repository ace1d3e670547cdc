"""What was measured of a model's activations: importance matrices."""

from bamba_quant.calibration.imatrix import MAY_BE_MISSING, Imatrix, Unmeasured, read_imatrix

__all__ = ["MAY_BE_MISSING", "Imatrix", "Unmeasured", "read_imatrix"]
