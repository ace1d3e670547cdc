"""The errors of the library: all derive from ``BambaQuantError``, and each subclass names the layer that raises it."""

from __future__ import annotations

from collections.abc import Sequence

from bamba_reference.errors import BambaQuantError, ConfigError, did_you_mean, repr_short

__all__ = [
    "ArchitectureError",
    "BambaQuantError",
    "CheckpointError",
    "ConfigError",
    "FetchError",
    "FormatError",
    "OutputError",
    "PlanError",
    "TokenizerError",
    "did_you_mean",
    "join_names",
    "repr_short",
]


class CheckpointError(BambaQuantError):
    """An input that cannot be read as what it claims to be."""


class FetchError(CheckpointError):
    """A file of the Hub that could not be fetched while an output is written, of which what is finished may be kept."""

    def resumable(self) -> FetchError:
        """The same where what is finished of the output is kept."""
        fix = f"{self.fix}; continue with --resume, as what is finished is kept"
        return FetchError(self.what, where=self.where, found=self.found, fix=fix)


class ArchitectureError(BambaQuantError):
    """A model, or a feature of one, that the tool or the output format cannot represent."""


class TokenizerError(BambaQuantError):
    """A vocabulary that is missing, unknown or contradicts the model."""


class FormatError(BambaQuantError):
    """Values that a number format cannot hold, or a format that does not exist."""


class PlanError(BambaQuantError):
    """A checkpoint, an architecture and a recipe that do not fit together."""


class OutputError(BambaQuantError):
    """An output that exists already, or that cannot be written."""


def join_names(names: Sequence[object], most: int = 5) -> str:
    """The first ``most`` names or numbers, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
