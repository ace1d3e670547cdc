"""``bamba-quant demo``: the main job, done on the model that travels with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bamba_quant_cli.console import print_table, size

if TYPE_CHECKING:
    from bamba_quant.tokenizers.encoder import Encoder
    from bamba_quant.weights import LoadedModel

EXAMPLES = """
Examples:

  bamba-quant demo

  bamba-quant demo --out /somewhere/else
"""

_CONTEXT, _CHUNKS = 256, 16


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the files it makes.")] = Path("demo"),
) -> None:
    """Convert the embedded bamba-mini to GGUF in every type, and run each file beside the original.

    The text is Python's own help; perplexity is llama-perplexity's, by the reference forward pass.
    """
    from bamba_quant.convert import plan_conversion
    from bamba_quant.embedded import embedded_model
    from bamba_quant.running import open_model
    from bamba_quant.writers import write_gguf

    out.mkdir(parents=True, exist_ok=True)
    source = embedded_model()
    loaded, encoder = open_model(source)
    tokens = encoder.encode(_help_text())
    typer.echo(f"{source.name}: {loaded.checkpoint.elements:,} weights, trained for this project\n")
    rows: list[tuple[object, ...]] = [
        (
            "(checkpoint)",
            size(loaded.checkpoint.n_bytes),
            "16.00",
            _perplexity(loaded, encoder, tokens),
            source,
        )
    ]
    for name in ("f32", "bf16", "q8_0", "q6_k", "q4_k_m", "q2_k"):
        conversion = plan_conversion(source, outtype=name, outfile=out)
        (file,) = write_gguf(conversion.plan, conversion.outfile, overwrite=True)
        converted, inner = open_model(file)
        rows.append(
            (
                name,
                size(file.stat().st_size),
                f"{conversion.plan.bits_per_weight:.2f}",
                _perplexity(converted, inner, tokens),
                file,
            )
        )
    print_table(("type", "size", "bits per weight", "perplexity", "where"), rows, right=(1, 2, 3))
    typer.echo("\nEach file runs in llama.cpp as it is. Try also:")
    typer.echo(f"  bamba-quant inspect {rows[-1][-1]} --tensors")
    typer.echo(f'  bamba-quant generate {rows[-1][-1]} --prompt "The function"')


def _help_text() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[: 16 * _CONTEXT * _CHUNKS]


def _perplexity(loaded: LoadedModel, encoder: Encoder, tokens: list[int]) -> str:
    from bamba_reference.perplexity import perplexity, torch_scorer
    from bamba_reference.torch_forward import load

    estimate = perplexity(
        torch_scorer(load(loaded.config, loaded.weights)),
        tokens,
        vocab_size=loaded.config.vocab_size,
        ctx=_CONTEXT,
        bos=encoder.bos,
        chunks=_CHUNKS,
    )
    return f"{estimate.perplexity:.3f} ± {estimate.error:.3f}"
