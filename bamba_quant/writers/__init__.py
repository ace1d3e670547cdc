"""Writers execute plans: streaming, atomic, deciding nothing."""

from bamba_quant.writers.gguf import layout, write_gguf

__all__ = ["layout", "write_gguf"]
