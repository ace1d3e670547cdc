"""What a Bamba model computes: its configuration and its forward pass, without knowledge of files."""

from bamba_reference.config import Config
from bamba_reference.errors import BambaQuantError, ConfigError

__all__ = ["BambaQuantError", "Config", "ConfigError"]
