"""Task scores by lm-evaluation-harness, of every kind of file that this package reads: ``bamba-quant[lm-eval]``."""

from bamba_quant.tasks.language_model import BambaQuantLM

__all__ = ["BambaQuantLM"]
