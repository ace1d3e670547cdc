"""Convert hybrid Mamba-2/attention checkpoints to GGUF, FP8 and int4, and prove what each file lost."""

from importlib.metadata import version

__version__ = version("bamba-quant")
