"""What a model of the family computes: its configuration and its forward pass, without knowledge of files.

The family: Bamba, Granite 4.0 hybrid, Mamba-2, Mamba, FalconMamba.
"""

from bamba_reference.config import Config
from bamba_reference.errors import BambaQuantError, ConfigError

__all__ = ["BambaQuantError", "Config", "ConfigError"]
