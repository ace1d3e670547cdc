"""lm-evaluation-harness' model: GGUF, FP8, int4 and Hugging Face directories in this process, on a CPU or a GPU.

Importing this module registers it in the harness as ``bamba-quant``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from bamba_quant.checkpoint import ReadOptions, open_checkpoint
from bamba_quant.errors import repr_short
from bamba_quant.evaluation.activations import resolve
from bamba_quant.evaluation.models import OpenedModel, describe
from bamba_quant.hub import local_path
from bamba_quant.inference.loading import load_model_and_tokenizer, torch_device, torch_dtype
from bamba_quant.inference.ready import ready_model
from bamba_quant.metadata.model_name import name_of
from bamba_quant.tasks.errors import TaskError, positive
from bamba_quant.tasks.generation import GenerationArguments, generate_texts
from bamba_quant.tasks.prompts import read_prompts, render
from bamba_reference.runtime.continuations import log_likelihoods

# What the harness scores: the texts, for its cache, and the tokens of context and continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class BambaQuantLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model for ``lm_eval.simple_evaluate(model=BambaQuantLM(path), tasks=[…])``.

    ``pretrained`` is a directory or a .gguf file; ``tokenizer`` another checkpoint whose tokenizer is used instead.
    ``dtype``, ``device``, ``backend``, ``activations`` and ``weights`` are those of ``bamba-quant perplexity``.
    ``batch_size`` is how many contexts are run together; "auto" takes as many as fit a budget, which does not change
    results beyond rounding.
    ``max_length`` (by default the model's) bounds a context with its continuation; what is longer loses its
    beginning. ``add_bos_token`` overrides whether the tokenizer adds BOS; ``prefix_token_id`` is the context of a text
    without one, by default BOS. ``seed`` is that of sampling. Raises a ``BambaQuantError`` for what cannot be run.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        backend: str = "auto",
        activations: str = "none",
        weights: str = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        reading: ReadOptions = ReadOptions(),
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            names = [name for name in (self.__init__.__kwdefaults__ or {}) if name != "reading"]  # type: ignore[misc]
            raise TaskError(
                "the model type bamba-quant has no such argument",
                where="--model_args",
                found=", ".join(unknown),
                expected=", ".join(["pretrained", *names]),
            )
        self._rows = positive("batch_size", batch_size, max_batch_size)
        self._device, number = torch_device(str(device)), torch_dtype(str(dtype))
        source = local_path(str(tokenizer), headers=True) if tokenizer else None
        self._loaded, self._encoder = load_model_and_tokenizer(str(pretrained), source, reading)
        checkpoint = self._loaded.checkpoint
        for note in checkpoint.notes:
            warnings.warn(f"{name_of(checkpoint.path).name}: {note}", stacklevel=2)
        self._prompts = read_prompts(
            open_checkpoint(source, weights=False) if source else checkpoint, self._encoder
        )
        self._path, self._seed, self._template_name = checkpoint.path, seed, "default"
        self._max_length: int = positive(
            "max_length", self._loaded.config.max_position_embeddings if max_length is None else max_length
        )
        self._max_gen_toks: int = positive("max_gen_toks", max_gen_toks)
        self._bos = (
            self._encoder.bos if add_bos_token is None else self._prompts.bos if add_bos_token else None
        )
        self._prefix = prefix_token_id
        self.model = ready_model(
            self._loaded,
            self._device,
            number,
            backend=str(backend),
            activations=resolve(activations, [checkpoint.kind]),
            weights=weights,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> BambaQuantLM:
        """The model of ``--model_args``, which go before the harness' options of the same name."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(options | arg_dict))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> BambaQuantLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        if self._prompts.eos is None:
            raise TaskError("the model has no end-of-text token", where=self._path)
        return self._prompts.eos

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one: ``prefix_token_id``, BOS, or the end of text."""
        chosen = self._prompts.bos if self._prefix is None else self._prefix
        return self.eot_token_id if chosen is None else chosen

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        return str(self._path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, BOS before them unless the text begins with it already or ``add_special_tokens`` is false."""
        ids = self._encoder.plain(string)
        bos = self._prompts.bos if add_special_tokens and self._bos is None else self._bos
        if add_special_tokens is False or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each continuation, in the order of the requests."""
        pairs, cut = [], []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise TaskError(
                    "a continuation has no tokens, or more than the model takes",
                    found=f"{len(continuation)} tokens: {repr_short(texts[1] if texts else '')}",
                    expected=f"1 to {self.max_length}",
                    fix="give a larger max_length in --model_args, or leave out the task",
                )
            kept = self.max_length + 1 - len(continuation)  # the last token is predicted and not run
            cut.append(len(context) > kept)
            pairs.append((context[-kept:], continuation))
        _tell_cut(cut, self.max_length)
        with _bar(len(pairs), "loglikelihood", disable_tqdm) as bar:
            found = log_likelihoods(self.model, pairs, rows=self._rows, progress=bar.update)
        answers = [(each.value, each.greedy) for each in found]
        for (texts, *_ids), answer in zip(requests, answers, strict=True):
            if texts is not None:  # a window of a longer text has no entry of its own in the harness' cache
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token scored once: after the prefix, in windows of ``max_length``."""
        windows: list[Request] = []
        borders = [0]
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            found = get_rolling_token_windows(
                token_list=ids[1:] if ids[:1] == [self.prefix_token_id] else ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in found]
            borders.append(len(windows))
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        totals = [float(sum(value for value, _ in answers[start:stop])) for start, stop in pairwise(borders)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context until one of its stop texts, in the order of the requests."""
        texts = [""] * len(requests)
        groups: dict[GenerationArguments, list[int]] = {}
        for number, request in enumerate(requests):
            arguments = GenerationArguments.of(request.args[1], self.max_gen_toks)
            groups.setdefault(arguments, []).append(number)
        with _bar(len(requests), "generate_until", disable_tqdm) as bar:
            for arguments, numbers in groups.items():
                room = self.max_length - arguments.most
                if room < 1:
                    raise TaskError(
                        "the new tokens leave no room for a context",
                        found=f"max_gen_toks {arguments.most}",
                        expected=f"less than max_length {self.max_length}",
                        fix="give a larger max_length in --model_args, or max_gen_toks in --gen_kwargs",
                    )
                prompts = [self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in numbers]
                _tell_cut([len(prompt) > room for prompt in prompts], room)
                for place, text in generate_texts(
                    self.model,
                    self._encoder,
                    [prompt[-room:] for prompt in prompts],
                    arguments,
                    stops=self._prompts.stops,
                    end_of_text=self.eot_token_id,
                    seed=self._seed,
                    rows=self._rows,
                ):
                    texts[numbers[place]] = text
                    self.cache_hook.add_partial("generate_until", requests[numbers[place]].args, text)
                    bar.update()
        return texts

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of that name, "default" for true, which ``apply_chat_template`` then uses."""
        if not chat_template:
            return None
        self._template_name = chat_template if isinstance(chat_template, str) else "default"
        return self._prompts.template(self._template_name)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a chat by the model's template; without the system message where that refuses one."""
        template = self._prompts.template(self._template_name)
        others = [message for message in chat_history if message["role"] != "system"]
        try:
            return render(template, chat_history, self._prompts.texts, add_generation_prompt)
        except TemplateError as error:
            refusal = error
        try:
            text = render(template, others, self._prompts.texts, add_generation_prompt)
        except TemplateError as error:
            raise TaskError(
                "the chat template cannot be applied", where=self._path, found=str(refusal)
            ) from error
        warnings.warn(
            f"the chat template refuses the system message; it is left out: {refusal}", stacklevel=2
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What the harness' results say of the model."""
        found = describe(OpenedModel(name_of(self._path).name, self._path, self._loaded))
        return {
            "model_num_parameters": found.weights,
            "model_dtype": str(self.model.dtype),
            "model_revision": "",
            "model_sha": "",
            "model_path": found.path,
            "model_architecture": found.architecture,
            "model_type": found.variant,
            "model_bits_per_weight": found.bits_per_weight,
            "model_backend": self.model.backend.name,
        }


def _tell_cut(cut: Sequence[bool], length: int) -> None:
    if any(cut):
        warnings.warn(
            f"{sum(cut)} of {len(cut)} contexts lost their beginning to fit in {length} tokens", stacklevel=2
        )


def _bar(total: int, what: str, hidden: bool) -> Any:
    return tqdm(total=total, desc=f"Running {what} requests", disable=hidden or None)


register_model("bamba-quant")(BambaQuantLM)
