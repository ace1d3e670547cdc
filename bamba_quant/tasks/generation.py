"""Texts that continue contexts until one of their stop texts, under the harness' arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from bamba_quant.tasks.errors import TaskError
from bamba_quant.tokenizers.encoder import Encoder
from bamba_reference.runtime.continuations import batches
from bamba_reference.runtime.generate import Sampling, generate_batch
from bamba_reference.torch.forward import Model

# Arguments that change nothing at these values.
_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "top_k": 0,
    "use_cache": True,
}


@dataclass(frozen=True)
class GenerationArguments:
    """``until`` are texts to stop at; ``most`` is the number of new tokens at most; temperature 0 is greedy."""

    until: tuple[str, ...]
    most: int
    temperature: float
    top_p: float

    @classmethod
    def of(cls, given: Mapping[str, Any], most: int) -> GenerationArguments:
        """The harness' ``generation_kwargs``; raises ``TaskError`` for what would be ignored."""
        known = normalize_gen_kwargs(dict(given), most)
        drawn = known.pop("do_sample")
        temperature, top_p = known.pop("temperature", 1.0), known.pop("top_p", 1.0)
        until, most = known.pop("until"), known.pop("max_gen_toks")
        strange = {name: value for name, value in known.items() if _NEUTRAL.get(name, ...) != value}
        if strange:
            raise TaskError(
                "an argument of the generation is not supported",
                where="generation_kwargs",
                found=", ".join(f"{name}={value}" for name, value in strange.items()),
                expected="until, max_gen_toks, do_sample, temperature, top_p",
                fix="leave it out of the task",
            )
        return cls(tuple(until), most, float(temperature) if drawn else 0.0, float(top_p) if drawn else 1.0)


def generate_texts(
    model: Model,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    arguments: GenerationArguments,
    *,
    stops: Sequence[int],
    end_of_text: int,
    seed: int,
    rows: int | None = None,
) -> Iterator[tuple[int, str]]:
    """The number of each prompt and the text after it, as they are done: longest prompts first, several together.

    A text ends before the first of the arguments' stop texts, at a token in ``stops`` or at ``end_of_text``. Special
    tokens are left out. ``rows`` is the number of prompts run together at most.
    """
    until = handle_stop_sequences(list(arguments.until), eos=encoder.decode([end_of_text]))

    def text(ids: Sequence[int]) -> str:
        return encoder.decode([each for each in ids if each not in encoder.special])

    def complete(ids: Sequence[int]) -> bool:
        so_far = text(ids)
        return any(end in so_far for end in until if end)

    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    parts = batches(model, order, lambda number: len(prompts[number]), rows, arguments.most)
    for number, part in enumerate(parts):
        new = generate_batch(
            model,
            [prompts[each] for each in part],
            max_new_tokens=arguments.most,
            # Rows of a batch draw differently; those of another batch need another seed.
            sampling=Sampling(arguments.temperature, arguments.top_p, seed + number),
            stop=[*stops, end_of_text],
            complete=complete,
        )
        for each, ids in zip(part, new, strict=True):
            yield each, postprocess_generated_text(text(ids), until, None)
