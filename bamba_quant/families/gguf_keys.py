"""The GGUF key-values that several families share: ``Reader`` reads them into a configuration, functions write them."""

from __future__ import annotations

import reprlib
from typing import Any, TypeVar

from gguf import Keys

from bamba_quant.checkpoint.gguf_values import KeyValues, float32, uint32
from bamba_quant.errors import ArchitectureError
from bamba_quant.families.hf_schema import MOST, MOST_HEAD_DIM, MOST_LAYERS
from bamba_quant.families.rules import Metadata, Tensors
from bamba_reference.config import Block, Config, single_block_layers

T = TypeVar("T")

# llama.cpp wants these two keys of every model.
NO_ATTENTION: Metadata = {"feed_forward_length": uint32(0), "attention.head_count": uint32(0)}


def gguf_architecture_of(values: KeyValues) -> str:
    """``general.architecture``, "" where it is missing. Raises ``CheckpointError`` for another type."""
    return values.text("general.architecture") or ""


def shape(config: Config) -> Metadata:
    """What ``Reader.shape`` reads."""
    return {
        "block_count": uint32(config.num_hidden_layers),
        "context_length": uint32(config.max_position_embeddings),
        "embedding_length": uint32(config.hidden_size),
        "vocab_size": uint32(config.vocab_size),
        "attention.layer_norm_rms_epsilon": float32(config.rms_norm_eps),
    }


def attention(config: Config) -> Metadata:
    """What ``Reader.attention`` reads, but for key-value heads, whose form differs between architectures."""
    return {
        "attention.head_count": uint32(config.num_attention_heads),
        "attention.key_length": uint32(config.head_dim),
        "attention.value_length": uint32(config.head_dim),
        "rope.freq_base": float32(config.rope_theta),
    }


def mamba2(config: Config) -> Metadata:
    """What ``Reader.mamba2`` reads."""
    return {
        "ssm.conv_kernel": uint32(config.mamba_d_conv),
        "ssm.inner_size": uint32(config.mamba_d_inner),
        "ssm.state_size": uint32(config.mamba_d_state),
        # For Mamba-2 llama.cpp reads the number of heads under this name.
        "ssm.time_step_rank": uint32(config.mamba_n_heads),
        "ssm.group_count": uint32(config.mamba_n_groups),
    }


def mamba1(config: Config) -> Metadata:
    """What ``Reader.mamba1`` reads."""
    return {
        "ssm.conv_kernel": uint32(config.mamba_d_conv),
        "ssm.inner_size": uint32(config.mamba_d_inner),
        "ssm.state_size": uint32(config.mamba_d_state),
        "ssm.time_step_rank": uint32(config.mamba_time_step_rank),
    }


class Reader:
    """The key-values below a file's architecture.

    Sizes are bounded by the longest dimension of ``tensors``, those of the file, as a damaged file could hold any
    number. A file without tensors holds a vocabulary only; nothing is allocated from its sizes.
    """

    def __init__(self, values: KeyValues, tensors: Tensors) -> None:
        self._values = values
        self._tensors = tensors
        self.architecture = gguf_architecture_of(values)
        # Sizes of parts that a model lacks may be somewhat larger: granite files without Mamba layers have ssm.* keys.
        self._largest = 4 * max((max(each.shape, default=1) for each in tensors.values()), default=MOST)

    def key(self, key: str) -> str:
        """The full name of a key of this architecture."""
        return f"{self.architecture}.{key}"

    def count(self, key: str, default: int | None = None, *, most: int | None = None) -> int:
        """The integer of at least 1 under ``key``, of at most the largest dimension in the file.

        Raises ``ArchitectureError`` when it is missing and there is no default, ``CheckpointError`` when it is
        anything else.
        """
        most = self._largest if most is None else most
        return self._required(key, self._values.integer(self.key(key), least=1, most=most), default)

    def positive(self, key: str, default: float | None = None) -> float:
        """The number above zero under ``key``, as float32 holds it. Raises ``ArchitectureError`` otherwise."""
        found = self._required(key, self._values.number(self.key(key)), default)
        if not 2.0**-126 <= found < 2.0**128:
            raise self._invalid(key, found, "a number above 0 that float32 holds")
        return found

    def scale(self, key: str) -> float | None:
        """The multiplier under ``key``; None where it is missing or 0, which llama.cpp takes for no multiplier."""
        return self._values.number(self.key(key)) or None

    def flag(self, key: str, default: bool) -> bool:
        """The boolean under ``key``."""
        found = self._values.flag(self.key(key))
        return default if found is None else found

    def experts(self) -> int:
        """The number of experts of a layer, 0 for a model without."""
        return self._values.integer(self.key("expert_count"), most=self._largest) or 0

    def blocks(self) -> int:
        """The number of layers, each of which has a tensor."""
        return self.count("block_count", most=min(MOST_LAYERS, len(self._tensors) or MOST_LAYERS))

    def per_layer(self, key: str, *, most: int | None = None) -> list[int]:
        """The integers of all layers under ``key``: an array, or one integer for all. Raises as ``count`` does."""
        name, blocks, most = self.key(key), self.blocks(), self._largest if most is None else most
        if self._values.is_array(name):
            found = self._values.integers(name, most=most)
        else:
            one = self._values.integer(name, most=most)
            found = None if one is None else [one] * blocks
        found = self._required(key, found)
        if len(found) != blocks:
            raise self._invalid(key, found, f"an integer for each of {blocks} layers")
        return list(found)

    def _required(self, key: str, found: T | None, default: T | None = None) -> T:
        found = default if found is None else found
        if found is None:
            raise ArchitectureError(
                "the file lacks a key-value its architecture needs",
                where=self._values.file,
                found=f"no {self.key(key)}",
            )
        return found

    def _invalid(self, key: str, found: object, expected: str) -> ArchitectureError:
        return ArchitectureError(
            f"the GGUF key {self.key(key)} has an invalid value",
            where=self._values.file,
            found=reprlib.repr(found),
            expected=expected,
        )

    def quotient(self, key: str, whole: int, part: int, of: str) -> int:
        """``whole``, the value of ``of``, divided by ``part``, that of ``key``, without a remainder."""
        if whole % part:
            raise self._invalid(key, part, f"a divisor of {self.key(of)}, {whole}")
        return whole // part

    def special_tokens(self) -> dict[str, Any]:
        """The fields of ``Config`` that GGUF keeps with the vocabulary."""
        bos, eos, padding = (
            self._values[key].value if key in self._values else None
            for key in (Keys.Tokenizer.BOS_ID, Keys.Tokenizer.EOS_ID, Keys.Tokenizer.PAD_ID)
        )
        return {
            "bos_token_id": bos,
            "eos_token_ids": (eos,) if eos is not None else (),
            "pad_token_id": padding,
        }

    def vocab_size(self) -> int:
        """Rows of the embedding: one for each token, where the file has a vocabulary (llama.cpp loads no other)."""
        tokens = self._values.texts(Keys.Tokenizer.LIST)
        found = self.count("vocab_size", None if tokens is None else len(tokens))
        if tokens is not None and found != len(tokens):
            raise self._invalid("vocab_size", found, f"{len(tokens)}, the length of {Keys.Tokenizer.LIST}")
        return found

    def shape(self) -> dict[str, Any]:
        """The fields of ``Config`` that every family has; tying shows in the tensors' names."""
        return {
            "vocab_size": self.vocab_size(),
            "hidden_size": self.count("embedding_length"),
            "rms_norm_eps": self.positive("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "max_position_embeddings": self.count("context_length", most=MOST),
            **self.special_tokens(),
        }

    def layers(self, block: Block) -> dict[str, Any]:
        """The field of ``Config`` of a model whose layers are this block and nothing else."""
        return {"layers": single_block_layers((block,) * self.blocks())}

    def expansion(self) -> int:
        """The width inside a mixer over that of the model."""
        width = self.count("ssm.inner_size")
        return self.quotient("embedding_length", width, self.count("embedding_length"), "ssm.inner_size")

    def mamba2(self, *, expands: bool = True) -> dict[str, Any]:
        """The fields of ``Config`` that Mamba-2 layers have; biases show in the tensors' names.

        Unless the inner width ``expands`` that of the model by a whole number, heads and their size give it.
        """
        heads, d_inner = self.count("ssm.time_step_rank"), self.count("ssm.inner_size")
        groups = self.count("ssm.group_count")
        self.quotient("ssm.group_count", heads, groups, "ssm.time_step_rank")
        return {
            "mamba_expand": self.expansion() if expands else 0,
            "mamba_n_heads": heads,
            "mamba_d_head": self.quotient("ssm.time_step_rank", d_inner, heads, "ssm.inner_size"),
            "mamba_n_groups": groups,
            "mamba_d_state": self.count("ssm.state_size"),
            "mamba_d_conv": self.count("ssm.conv_kernel"),
            "mamba_conv_bias": self.has_convolution_bias(),
        }

    def mamba1(self) -> dict[str, Any]:
        """The fields of ``Config`` that Mamba's layers have; biases show in the tensors' names."""
        return {
            "mamba_expand": self.expansion(),
            "mamba_d_state": self.count("ssm.state_size"),
            "mamba_d_conv": self.count("ssm.conv_kernel"),
            "mamba_conv_bias": self.has_convolution_bias(),
            "mamba_time_step_rank": self.count("ssm.time_step_rank"),
        }

    def attention(
        self, feed_forward: tuple[Block, ...] = ("mlp",), mixer: Block = "mamba2"
    ) -> dict[str, Any]:
        """The fields of ``Config`` that attention layers have; a layer without key-value heads has ``mixer``."""
        heads = self.count("attention.head_count")
        kv_heads = self.per_layer("attention.head_count_kv", most=heads)
        for count in set(kv_heads) - {0}:
            self.quotient("attention.head_count_kv", heads, count, "attention.head_count")
        return {
            "layers": single_block_layers(
                ("attention" if count else mixer for count in kv_heads), feed_forward
            ),
            "num_attention_heads": heads,
            "num_key_value_heads": max(kv_heads),
            "head_dim": self.count(
                "attention.key_length", max(1, self.count("embedding_length") // heads), most=MOST_HEAD_DIM
            ),
            "rope_theta": self.positive("rope.freq_base", 10000.0),
            "attention_bias": self.has_bias("attn_q"),
        }

    def rotary_dim(self, head_dim: int) -> int:
        """How many of the elements of each head are rotated, all where the file says nothing."""
        found = self.count("rope.dimension_count", head_dim, most=head_dim)
        if found % 2:
            raise self._invalid(
                "rope.dimension_count", found, f"an even number up to the head size, {head_dim}"
            )
        return found

    def has_bias(self, kind: str) -> bool:
        """Whether the file has biases of this kind."""
        return any(name.endswith(f"{kind}.bias") for name in self._tensors)

    def has_convolution_bias(self) -> bool:
        """Whether the convolution has a bias; true for a model without convolution, as llama.cpp supports no other."""
        convolution = any(name.endswith("ssm_conv1d.weight") for name in self._tensors)
        return self.has_bias("ssm_conv1d") or not convolution


def is_granite(values: KeyValues) -> bool:
    """Whether a file has multipliers or experts, which tell a Granite's ``granitehybrid`` from a Bamba's."""
    name = gguf_architecture_of(values)
    return any(
        values.number(f"{name}.{key}")
        for key in ("embedding_scale", "residual_scale", "attention.scale", "logit_scale", "expert_count")
    )
