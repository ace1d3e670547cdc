"""What a recipe is: for each role, formats and the positions that they are for, and formats of single tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from gguf import LlamaFileType

# What a row takes whose length its format's blocks do not fill (llama-quant.cpp, ``tensor_type_fallback``).
FALLBACKS = {
    "iq4_xs": "iq4_nl",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}


# llama.cpp keeps these in float32 in every file (convert_hf_to_gguf.py: 1-D tensors, norms, the convolution and
# the router; llama-quantize keeps the same ones).
ALWAYS_F32 = frozenset({"norm", "bias", "ssm_conv1d", "ssm_dt", "ssm_a", "ssm_d", "ffn_gate_inp"})


@dataclass(frozen=True)
class TensorPosition:
    """The position of a tensor: number ``index`` of ``count`` among those of its role, in layer order.

    ``grouped_query`` is query heads per key-value head in the first layer, 0 where that is not an attention layer;
    ``experts`` is how many a mixture has, else 0; ``imatrix`` says whether importance was measured. ``layer`` is
    the number of its layer, None outside the layers; ``before_attention`` says that this layer has no attention and
    the next one has.
    """

    index: int
    count: int
    grouped_query: int
    experts: int
    imatrix: bool
    layer: int | None = None
    before_attention: bool = False


Condition = Callable[[TensorPosition], bool]


def precedes(layer: int | None, attention: Collection[int | None]) -> bool:
    """``TensorPosition.before_attention`` of a layer, by the numbers of the layers with attention."""
    return layer is not None and layer not in attention and layer + 1 in attention


def anywhere(position: TensorPosition) -> bool:
    return True


def _use_more_bits(position: TensorPosition) -> bool:
    """The first and the last eighth, and every third between (llama-quant.cpp, ``use_more_bits``)."""
    eighth = position.count // 8
    return (
        position.index < eighth
        or position.index >= 7 * position.count // 8
        or (position.index - eighth) % 3 == 2
    )


# The conditions that a recipe file can name; "measured" means that there is an importance matrix.
CONDITIONS: Mapping[str, Condition] = {
    "more_bits": _use_more_bits,
    "first_eighth": lambda position: position.index < position.count // 8,
    "first_sixteenth": lambda position: position.index < position.count // 16,
    "first_two": lambda position: position.index < 2,
    "first_four": lambda position: position.index < 4,
    "grouped_query": lambda position: position.grouped_query >= 4,
    "eight_experts": lambda position: position.experts == 8,
    "several_experts": lambda position: position.experts > 1,
    "before_attention": lambda position: position.before_attention,
    "first_eighth_measured": lambda position: position.imatrix and position.index < position.count // 8,
    "first_eighth_unmeasured": lambda position: not position.imatrix and position.index < position.count // 8,
}


@dataclass(frozen=True)
class InLayers:
    """The condition that a tensor belongs to one of these layers, counted from 0."""

    layers: frozenset[int]

    def __call__(self, position: TensorPosition) -> bool:
        return position.layer in self.layers


@dataclass(frozen=True)
class Choice:
    """A format, and the positions that it is for."""

    format: str
    when: Condition = anywhere


@dataclass(frozen=True)
class Assignment:
    """The format of the tensor called ``name`` in GGUF, or of those in whose names ``pattern`` is found."""

    format: str
    name: str = ""
    pattern: str = ""

    def covers(self, name: str) -> bool:
        """Whether it is for the tensor called ``name``."""
        return name == self.name if self.name else re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Recipe:
    """A mixture of formats under the name users know.

    ``default`` is the format of every matrix; ``roles`` lists what some roles take instead, the first choice whose
    position fits; ``tensors`` are formats of single tensors, which come before both, the first that covers one;
    ``file_type`` is what ``general.file_type`` says; ``needs_importance`` names formats that this recipe does not
    use without an importance matrix; ``about`` is its documentation. With ``candidates`` bits are then moved between
    tensors: each takes one of these formats, so that the estimated loss is least at no more bytes (``hybrid``).
    With ``refine`` scales are searched further than ggml does (``formats.cpu.refinement``).
    """

    name: str
    file_type: LlamaFileType
    default: str
    about: str
    roles: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    needs_importance: frozenset[str] = frozenset()
    tensors: tuple[Assignment, ...] = ()
    candidates: tuple[str, ...] = ()
    refine: bool = False

    def assigned(self, name: str) -> str | None:
        """The format that ``tensors`` give the tensor called ``name``, or None."""
        return next((each.format for each in self.tensors if each.covers(name)), None)

    def format_for(self, role: str, position: TensorPosition) -> str:
        """The format of a matrix of this role at this position."""
        fitting = (choice.format for choice in self.roles.get(role, ()) if choice.when(position))
        return next(fitting, self.default)
