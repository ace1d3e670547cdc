"""FP8 and FP4 products: the inputs of a matrix are rounded to e4m3 or e2m1, as the checkpoint says.

A scale is the largest magnitude of a token, a text or a group of columns over 448, and scale and quotient are float32,
as vLLM's kernels have them and compressed-tensors in a float32 model; codes are the nearest. Products of codes are
exact either way: emulated, the rounded activations go to the backend's own product; on a GPU that can, codes go to
torch's scaled product, which sums them in float32 and multiplies by both scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bamba_quant.checkpoint import PackedTensor, StackedTensor, packed_like
from bamba_quant.checkpoint.dequantize import Float8Dequantizer
from bamba_quant.checkpoint.packed import Activations
from bamba_quant.errors import BambaQuantError, join_names
from bamba_quant.evaluation.fp4_activations import ROUNDED
from bamba_quant.inference.weights import LazyWeights
from bamba_reference.tensors import stack_of
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.ops import wide

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# Rows and columns of a matrix come in multiples of it (ATen, ``_scaled_mm``).
_MULTIPLE = 16
# With greater scales than these no weight is a subnormal bfloat16, nor is a float16 further from a weight than half the
# way to the next.
_LEAST_SCALE = 2.0**-100
_LEAST_SCALE_OF_FLOAT16 = 2.0**-14


def quantized(x: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """Codes e4m3 and scales, wide, that broadcast against them, of x (texts, tokens, columns) or (tokens, columns).

    Both have the columns in two axes where groups share a scale. A tensor is one text, so that figures do not depend
    on which texts run together.
    """
    values = x.to(wide(x.dtype))
    if activations.strategy == "group":
        values = values.unflatten(-1, (-1, activations.group))
    if activations.scale:
        scale = values.new_full((1,) * values.dim(), activations.scale)
        return (values / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale
    axes = tuple(range(x.dim() - 2, x.dim())) if activations.strategy == "tensor" else (-1,)
    largest = values.abs().amax(axes, keepdim=True)
    # By a tensor: CUDA multiplies by the reciprocal of a number instead, which is another result.
    scale = largest / torch.full_like(largest, LARGEST)
    scale = torch.where(scale > 0, scale, 1)
    return (values / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def rounded(x: Tensor, activations: Activations) -> Tensor:
    """x rounded to its codes and scales, in x's dtype."""
    if activations.strategy in ROUNDED:
        return ROUNDED[activations.strategy](x, activations.scale)
    codes, scale = quantized(x, activations)
    return (codes.to(scale.dtype) * scale).reshape(x.shape).to(x.dtype)


def weight_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """The e4m3 codes of a bfloat16 matrix (rows, columns) that was made of them and ``scale`` (rows, 1).

    The product was rounded by 2^-9 at most, and codes are 2^-4 apart at least: the nearest is the one it was.
    """
    return (weight.float() / scale).to(E4M3)


def scaled_product(x: Tensor, codes: Tensor, scale: Tensor, activations: Activations) -> Tensor:
    """x (…, columns) rounded times codes (rows, columns) of ``scale`` (rows, 1) transposed: (…, rows) bfloat16."""
    flat = x.reshape(-1, x.shape[-1])
    if x.is_cuda and activations.strategy == "token":
        from bamba_quant.codecs.fp8.activations import quantize_by_token

        mine, tokens = quantize_by_token(flat)
    else:
        mine, shared = quantized(x, activations)
        mine, tokens = mine.view(flat.shape), shared.expand(*x.shape[:-1], 1).reshape(-1, 1).contiguous()
    product: Tensor = torch._scaled_mm(
        mine, codes.t(), tokens, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=False
    )
    return product.view(*x.shape[:-1], len(codes))


def has_scaled_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's scaled product by rows runs there: Ada, Hopper and later, and it gives bfloat16."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def with_fp8_activations(backend: Backend, weights: LazyWeights, *, scaled: bool = False) -> Backend:
    """``backend`` with the inputs of each matrix rounded as the checkpoint says; ``backend`` itself if it rounds none.

    ``scaled`` uses scaled products for matrices with one scale a row and activations with one scale a token. Raises
    ``BambaQuantError`` for a strategy that ``Activations`` does not have, and for groups that do not divide a row.
    """
    stored = {name: weights.stored(name)[0] for name in weights}
    packed = {name: found for name, tensor in stored.items() if (found := packed_like(tensor)) is not None}
    rules = {name: tensor.activations for name, tensor in packed.items() if tensor.activations is not None}
    unknown = [f"{name}: {rule}" for name, rule in rules.items() if rule.unknown]
    if unknown:
        raise BambaQuantError(
            "the checkpoint's rounding of activations is not supported",
            found=join_names(unknown, 1),
            expected="e4m3 with dynamic scales or one for a tensor, nvfp4 or mxfp4",
            fix="evaluate with --activations none",
        )
    cut = [
        f"{name}: {packed[name].columns} columns, {rule}"
        for name, rule in rules.items()
        if rule.group and packed[name].columns % rule.group
    ]
    if cut:
        raise BambaQuantError(
            "the columns of a matrix do not divide into groups of activations",
            found=join_names(cut, 1),
            expected="columns that are a multiple of the group",
            fix="evaluate with --activations none",
        )
    if not rules:
        return backend
    alone = {name: rule for name, rule in rules.items() if stored[name] is packed[name]}
    by_codes = _by_codes(packed, alone) if scaled else {}
    made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def codes_of(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix's codes and scales, kept for as long as the matrix is."""
        if weight not in made:
            scale = torch.from_numpy(by_codes[name].scales()).to(weight.device)
            made[weight] = weight_codes(weight, scale), scale
        found: tuple[Tensor, Tensor] = made[weight]
        return found

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        if name in by_codes:
            y = scaled_product(x, *codes_of(name, weight), rules[name])
            return y if bias is None else y + bias
        stack, matrix = stack_of(name)
        rule = rules.get(stack)
        if rule is not None and isinstance(whole := stored[stack], StackedTensor):
            rule = cast(PackedTensor, whole.matrices[matrix or 0]).activations
        return backend.linear(x if rule is None else rounded(x, rule), weight, bias, name)

    def head(x: Tensor, weight: Tensor, name: str) -> Tensor:
        return backend.head(rounded(x, rules[name]) if name in rules else x, weight, name)

    kinds = ", ".join(dict.fromkeys(str(rule) for rule in rules.values()))
    how = "emulated"
    if by_codes:
        rest = len(rules) - len(by_codes)
        how = "scaled products" + (f", {rest} of {len(rules)} emulated" if rest else "")
    return backend.with_linear(linear, name=f"{backend.name}, activations {kinds} ({how})", head=head)


def _by_codes(
    packed: Mapping[str, PackedTensor], rules: Mapping[str, Activations]
) -> dict[str, PackedTensor]:
    """The matrices that torch's scaled product supports: one scale a row, sizes that divide, no subnormals."""

    def takes(tensor: PackedTensor, rule: Activations) -> bool:
        divides = tensor.rows % _MULTIPLE == 0 == tensor.columns % _MULTIPLE
        by_row = rule.strategy in ("token", "tensor") and not rule.scale and tensor.scale.width == 1
        float16 = isinstance(tensor.dequantizer, Float8Dequantizer) and tensor.dequantizer.dtype == "f16"
        least = _LEAST_SCALE_OF_FLOAT16 if float16 else _LEAST_SCALE
        return by_row and divides and bool((abs(tensor.scales()) > least).all())

    return {name: packed[name] for name, rule in rules.items() if takes(packed[name], rule)}
