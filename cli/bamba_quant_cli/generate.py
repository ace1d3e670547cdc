"""``bamba-quant generate``: continue a prompt by the reference forward pass."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, echo, echo_text, print_json
from bamba_quant_cli.interrupts import set_interrupt_message

EXAMPLES = """
Examples:

  bamba-quant generate ./Bamba-9B --prompt "The old mill" --max-tokens 40

  bamba-quant generate bamba-9b-Q8_0.gguf --prompt "def f(" --temperature 0.8 --top-p 0.95 --seed 7
"""


def generate(
    model: opt.Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="New tokens at most.")] = 100,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, more draws more freely.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    stop: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="Stop at this token instead of the model's own. Repeatable."),
    ] = None,
    activations: opt.Activations = "none",
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    backend: opt.Backend = "auto",
    weights: opt.Weights = "auto",
    threads: opt.Threads = None,
    tokenizer: opt.Tokenizer = None,
    ignore_config_key: opt.IgnoreConfigKey = None,
    ignore_adapter: opt.IgnoreAdapter = False,
    strip_prefix: opt.StripPrefix = "",
    as_json: opt.AsJson = False,
) -> None:
    """Continue a prompt with any model this tool reads; the text appears as it is made."""
    from bamba_quant.checkpoint import open_checkpoint
    from bamba_quant.errors import BambaQuantError
    from bamba_quant.evaluation.activations import resolve
    from bamba_quant.inference.loading import load_model_and_tokenizer, torch_device, torch_dtype
    from bamba_quant.inference.ready import ready_model
    from bamba_quant.inference.threads import use_threads
    from bamba_quant.tokenizers.special_tokens import stop_tokens
    from bamba_reference.runtime.generate import Sampling
    from bamba_reference.runtime.generate import generate as steps

    use_threads(threads)
    sampling = Sampling(temperature, top_p, seed)
    if temperature == 0 and top_p != 1:
        raise BambaQuantError("--top-p has no effect at temperature 0", fix="give a --temperature above 0")
    with ExitStack() as progress:
        progress.enter_context(Progress("")).say("reading the model")
        loaded, encoder = load_model_and_tokenizer(
            model, tokenizer, opt.read_options(ignore_config_key, ignore_adapter, strip_prefix)
        )
        for note in loaded.checkpoint.notes:
            opt.print_note(note)
        outside = [token for token in stop or () if not 0 <= token < loaded.config.vocab_size]
        if outside:
            raise BambaQuantError(
                "--stop names tokens that the model does not have",
                found=outside,
                expected=f"ids from 0 to {loaded.config.vocab_size - 1}",
            )
        ready = ready_model(
            loaded,
            torch_device(device),
            torch_dtype(dtype),
            backend=backend,
            activations=resolve(activations, [loaded.checkpoint.kind]),
            weights=weights,
        )
        ids = encoder.encode(prompt)
        new: list[int] = []
        shown = ""
        ends = stop or stop_tokens(loaded.checkpoint)
        if not ends and tokenizer:  # a GGUF without a vocabulary
            ends = stop_tokens(open_checkpoint(tokenizer, weights=False))
        for token in steps(ready, ids, max_new_tokens=max_tokens, sampling=sampling, stop=ends):
            if not new:
                _begin_text(progress, prompt, as_json)
            new.append(token)
            text = encoder.decode(ids + new)[len(encoder.decode(ids)) :]
            # A letter of several tokens is shown when it is whole.
            if not as_json and not text.endswith("\ufffd"):
                echo_text(text[len(shown) :])
                shown = text
        if not new:
            _begin_text(progress, prompt, as_json)
    if as_json:
        ended = "length" if len(new) == max_tokens else "stop"
        print_json(
            {
                "model": model,
                "prompt": prompt,
                "text": encoder.decode(new),
                "tokens": new,
                "finish_reason": ended,
                "backend": ready.backend.name,
            }
        )
    else:
        echo()


def _begin_text(progress: ExitStack, prompt: str, as_json: bool) -> None:
    """The text appears where the progress was."""
    progress.close()
    if not as_json:
        set_interrupt_message(_end_text)
        echo_text(prompt)


def _end_text() -> str:
    echo()
    return "the text is incomplete"
