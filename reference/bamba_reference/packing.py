"""Which tokens of a batch belong together: positions, padding and packed sequences, checked and in one form.

A row of a batch is one sequence, or one sequence behind padding (``attention_mask``), or several packed one
after another without padding. Packing is named as transformers' padding-free inputs name it
(``DataCollatorWithFlattening``): ``seq_idx``, ``cu_seq_lens`` or ``position_ids`` that start again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bamba_reference.errors import BambaQuantError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class InputError(BambaQuantError):
    """Tokens, masks or positions that cannot be run."""


@dataclass(frozen=True)
class Layout:
    """What the forward pass needs to know about the L new tokens of each of B rows.

    ``positions`` (B, L) are the rotary embedding's. ``sequence_starts`` (B, L) marks tokens that begin a packed
    sequence and must see nothing before them; none where rows are not packed. ``real`` (B, L) is false at
    padding; None without padding. ``padding`` (B,) counts the padding tokens at the beginning of each row, those of
    earlier calls included.
    """

    positions: Ints
    sequence_starts: Bools | None
    real: Bools | None
    padding: Ints

    def of_rows(self, rows: slice) -> Layout:
        """The layout of some of the rows."""
        parts = (self.positions, self.sequence_starts, self.real, self.padding)
        return Layout(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]


def check_tokens(tokens: Ints, vocab_size: int) -> None:
    """Raise ``InputError`` unless every id names a row of the embedding and there is at least one."""
    if tokens.size == 0:
        raise InputError("there are no tokens to run", found=f"shape {tokens.shape}", expected="at least one")
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        raise InputError(
            "a token id is out of the vocabulary's range",
            where=f"token {where[0] if len(where) == 1 else where}",
            found=f"{int(tokens[where])} ({int(outside.sum())} such of {tokens.size})",
            expected=f"0 to {vocab_size - 1}",
            fix="tokenize with the tokenizer of this model",
        )


def layout(
    shape: tuple[int, int],
    *,
    past: int = 0,
    padding: Ints | None = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    seq_idx: Any = None,
    cu_seq_lens: Any = None,
) -> Layout:
    """The layout of a (B, L) batch that follows ``past`` tokens, from the caller's description.

    ``attention_mask`` (B, past + L), or (B, L) of the new tokens alone: 1 for tokens, 0 for padding on the
    left. ``position_ids`` (B, L) or (L,). ``seq_idx`` (B, L) or (L,): a number for each packed sequence.
    ``cu_seq_lens`` (n + 1,): the sequences' borders in a batch of one row. ``padding`` (B,): the padding in
    earlier calls. Raises ``InputError`` for shapes that do not fit, padding after a token, packing
    together with padding or with a state, and descriptions of the packing that contradict each other.
    """
    B, L = shape
    padding = np.zeros(B, np.int64) if padding is None else padding
    real = None
    if attention_mask is not None:
        real, padding = _checked_padding(np.asarray(attention_mask), shape, past, padding)
    given = None if position_ids is None else _rows("position_ids", position_ids, shape)
    sequence_starts = _sequence_starts(
        shape, given if real is None and past == 0 else None, seq_idx, cu_seq_lens
    )
    if sequence_starts is not None and (past or real is not None):
        raise InputError(
            "packed sequences cannot be combined with padding or with a state",
            found="a state" if past else "an attention_mask",
            expected="packed sequences in one pass without attention_mask",
            fix="drop the padding, or run the sequences as rows of a batch",
        )
    if given is None:
        index = np.broadcast_to(past + np.arange(L), shape)  # (B, L)
        if sequence_starts is None:
            given = np.maximum(index - padding[:, None], 0)
        else:
            given = index - np.maximum.accumulate(np.where(sequence_starts, index, 0), axis=1)
    return Layout(positions=given, sequence_starts=sequence_starts, real=real, padding=padding)


def _rows(name: str, values: Any, shape: tuple[int, int]) -> Ints:
    array = np.asarray(values, dtype=np.int64)
    if array.shape not in (shape, shape[1:], (1, shape[1])):
        raise InputError(
            f"{name} does not fit the tokens", found=f"shape {array.shape}", expected=f"shape {shape}"
        )
    return np.broadcast_to(array, shape)


def _checked_padding(
    mask: Any, shape: tuple[int, int], past: int, padding: Ints
) -> tuple[Bools | None, Ints]:
    B, L = shape
    if mask.shape not in ((B, past + L), (B, L)):
        raise InputError(
            "attention_mask does not fit the tokens",
            found=f"shape {mask.shape}",
            expected=f"shape {(B, past + L)}"
            + (f", of which {past} have been run, or {shape}" if past else ""),
        )
    real = mask[:, mask.shape[1] - L :].astype(bool)
    if mask.shape[1] > L and (mask[:, :past].astype(bool) != (np.arange(past) >= padding[:, None])).any():
        raise InputError(
            "attention_mask pads other tokens than in the earlier calls",
            expected=f"padding of {padding.tolist()} tokens on the left",
        )
    behind = np.logical_or.accumulate(real, axis=1) | (padding < past)[:, None]
    if (behind & ~real).any():
        row, column = (int(i) for i in np.argwhere(behind & ~real)[0])
        raise InputError(
            "padding follows a token; padding would change the state of a state-space layer",
            where=f"row {row}, token {past + column}",
            expected="padding on the left only",
            fix="pad on the left, or pack the sequences without padding (seq_idx)",
        )
    return (None if real.all() else real), padding + (~real).sum(axis=1)


def _sequence_starts(
    shape: tuple[int, int], position_ids: Ints | None, seq_idx: Any, cu_seq_lens: Any
) -> Bools | None:
    """Where packed sequences begin, each row's first token included; None where rows are not packed."""
    B, L = shape
    said: dict[str, Bools] = {}
    if seq_idx is not None:
        said["seq_idx"] = np.diff(_rows("seq_idx", seq_idx, shape), axis=1, prepend=-1) != 0
    if cu_seq_lens is not None:
        borders = np.asarray(cu_seq_lens, dtype=np.int64)
        if (
            B != 1
            or borders.ndim != 1
            or len(borders) < 2
            or borders[0] != 0
            or borders[-1] != L
            or (np.diff(borders) < 0).any()
        ):
            raise InputError(
                "cu_seq_lens does not divide the tokens",
                found=f"{borders.tolist()} for a batch of shape {shape}",
                expected=f"one row and rising borders from 0 to {L}",
            )
        marks = np.zeros(shape, bool)
        marks[0, borders[:-1][np.diff(borders) > 0]] = True
        said["cu_seq_lens"] = marks
    if position_ids is not None:
        restarts = np.diff(position_ids, axis=1) != 1
        if said or restarts.any():
            said["position_ids"] = np.concatenate([np.ones((B, 1), bool), restarts], axis=1)
    for marks in said.values():
        marks[:, 0] = True
    if not said:
        return None
    (name, first), *others = said.items()
    for other, marks in others:
        if (marks != first).any():
            row, column = (int(i) for i in np.argwhere(marks != first)[0])
            raise InputError(
                f"{name} and {other} give different starts of the packed sequences",
                where=f"row {row}, token {column}",
                expected="the same borders from both",
            )
    return first
