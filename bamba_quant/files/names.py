"""Names of the small files of a model's directory: what is copied, and what is fetched beside weights."""

from __future__ import annotations

CONFIG = "config.json"
CARD = "README.md"
CHAT_TEMPLATES = "additional_chat_templates"  # transformers' directory for all but the default one
# Small files that belong to a model whatever its weights are: a quantized copy of the model has them too.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",  # those of CHAT_TEMPLATES, too
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
