"""Text that a model writes itself."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bamba_reference.packing import InputError
from bamba_reference.torch.forward import Model, forward, new_state

_ROWS = {"cpu": 64, "cuda": 1024}  # sequences that are written together


@torch.no_grad()
def write_text(model: Model, chunks: int, ctx: int, bos: int | None, seed: int) -> NDArray[np.int64]:
    """``chunks`` sequences (chunks, ctx) drawn at temperature 1, each behind BOS; the same seed draws the same.

    Raises ``InputError`` for a model without a BOS token.
    """
    if bos is None:
        raise InputError("the model has no BOS token to begin its own text with", fix="give a text")
    generator = torch.Generator(model.device).manual_seed(seed)
    written = []
    rows = _ROWS.get(model.device.type, _ROWS["cpu"])
    for start in range(0, chunks, rows):
        state = new_state(model, min(rows, chunks - start))
        tokens = torch.full((state.batch, 1), bos, dtype=torch.int64, device=model.device)
        columns = [tokens]
        for _ in range(ctx - 1):
            logits = forward(model, tokens, state=state).logits[:, -1]
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            columns.append(tokens)
        written.append(torch.cat(columns, dim=1).cpu().numpy())
    return np.concatenate(written)
