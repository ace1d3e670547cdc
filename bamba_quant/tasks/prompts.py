"""What a checkpoint's tokenizer says about prompts: its BOS and EOS, and its chat templates."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.encoder import Encoder
from bamba_quant.tokenizers.gguf_vocabulary import read_gguf_vocabulary
from bamba_quant.tokenizers.settings import SPECIAL_KINDS, read_tokenizer_config
from bamba_quant.tokenizers.special_tokens import chat_templates, stop_tokens

_END = "END_OF_THE_FINAL_MESSAGE "


@dataclass(frozen=True)
class Prompts:
    """``bos`` and ``eos`` are ids, also where the tokenizer adds neither to a text; ``stops`` are the ids that end one.

    ``templates`` are chat templates by name, the usual one under "default"; ``texts`` the special tokens that they may
    write, such as ``bos_token``.
    """

    bos: int | None
    eos: int | None
    stops: tuple[int, ...]
    texts: Mapping[str, str]
    templates: Mapping[str, str]

    def template(self, name: str) -> str:
        """A chat template. Raises ``TokenizerError`` listing the names."""
        if name not in self.templates:
            raise TokenizerError(
                "the model has no such chat template",
                found=name,
                expected=", ".join(sorted(self.templates)) or "a model with a chat template",
                fix="leave out --apply_chat_template",
            )
        return self.templates[name]


def read_prompts(checkpoint: Checkpoint, encoder: Encoder) -> Prompts:
    """What the tokenizer of ``checkpoint`` says, which ``encoder`` was read from; errors as ``read_encoder``'s."""
    if checkpoint.kind == "gguf":
        vocabulary = read_gguf_vocabulary(checkpoint.path, checkpoint.metadata)
        special = vocabulary.all_special if vocabulary else {}
        texts = {kind: vocabulary.tokens[token] for kind, token in special.items()} if vocabulary else {}
        templates = vocabulary.chat_templates if vocabulary else {}
    else:
        config = read_tokenizer_config(checkpoint.path)
        named = ((kind, config.special_token(kind)) for kind in SPECIAL_KINDS)
        texts = {kind: text for kind, text in named if text is not None}
        encoded = {kind: encoder.plain(texts[kind]) for kind in ("bos", "eos") if kind in texts}
        special = {kind: ids[0] for kind, ids in encoded.items() if len(ids) == 1}
        templates = chat_templates(config)
    stops = stop_tokens(checkpoint)
    return Prompts(
        bos=special.get("bos"),
        eos=special.get("eos", stops[0] if stops else None),
        stops=stops,
        texts={f"{kind}_token": text for kind, text in texts.items()},
        templates=templates,
    )


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    texts: Mapping[str, str],
    add_generation_prompt: bool,
) -> str:
    """The prompt of a chat, as transformers' ``apply_chat_template`` makes it, in jinja's sandbox.

    Without ``add_generation_prompt`` it ends with the last message's text, for the model to continue it. Raises
    jinja's ``TemplateError`` for what the template refuses.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = datetime.datetime.now().strftime
    chat = [dict(message) for message in messages]
    if not add_generation_prompt:
        chat[-1]["content"] += _END
    text = environment.from_string(template).render(
        messages=chat, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **texts
    )
    if add_generation_prompt:
        return text
    if _END.strip() not in text:
        raise TemplateError("the template leaves out the last message")
    text, after = text[: (end := text.rindex(_END.strip()))], text[end:]
    return text if after.startswith(_END) else text.rstrip()


class _Generation(Extension):
    """The block in which transformers' templates enclose what the model has written: what is in it, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter writes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
