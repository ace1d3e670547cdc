"""What a user allows when a checkpoint directory is read: everything here is refused by default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadOptions:
    """How to read a Hugging Face directory; GGUF files ignore all of it.

    ``ignore_config_keys`` are keys of config.json that the user says change no logit. ``ignore_adapter`` reads the
    base model where an adapter is stored beside it. ``strip_prefix`` is removed from every tensor name that begins
    with it.
    """

    ignore_config_keys: tuple[str, ...] = ()
    ignore_adapter: bool = False
    strip_prefix: str = ""
