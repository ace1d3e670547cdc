"""The model in lm-evaluation-harness beside the harness' own Hugging Face backend, on tasks with local data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.tasks import BambaQuantLM
from bamba_quant.tasks.errors import TaskError
from bamba_quant.writers import write_plan
from tests.support.conversion import to_gguf
from tests.support.tasks import CHOICE, GENERATION, ROLLING, TASKS, write_tasks

# Windows of this many tokens cut whole texts, and contexts at their beginning.
MAX_LENGTH = 100


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[:40_000]
    directory = write_tasks(tmp_path_factory.mktemp("tasks") / "tasks", text, count=6)
    return TaskManager(include_path=str(directory), include_defaults=False)


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    return HFLM(str(embedded_model()), device="cpu", dtype="float32", max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def ours() -> BambaQuantLM:
    return BambaQuantLM(embedded_model(), max_length=MAX_LENGTH)


def run(model: Any, tasks: TaskManager, *names: str, **options: Any) -> dict[str, Any]:
    found = simple_evaluate(model, tasks=list(names), task_manager=tasks, bootstrap_iters=0, **options)
    assert found is not None
    return found


def answers(found: dict[str, Any], task: str) -> list[Any]:
    return [answer for sample in found["samples"][task] for (answer,) in sample["resps"]]


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.filterwarnings("ignore:.*lost their beginning")
def test_every_kind_of_task_as_the_harness_runs_it(
    ours: BambaQuantLM, theirs: HFLM, tasks: TaskManager, tmp_path: Path
) -> None:
    """Also of a GGUF file without loss."""
    gguf = BambaQuantLM(
        to_gguf(embedded_model(), tmp_path / "f32.gguf", "f32"), max_length=MAX_LENGTH, batch_size=3
    )
    expected = run(theirs, tasks, CHOICE, GENERATION)
    for model in (ours, gguf):
        found = run(model, tasks, *TASKS)
        for task, metric in ((CHOICE, "acc"), (CHOICE, "acc_norm"), (GENERATION, "exact_match")):
            assert found["results"][task][f"{metric},none"] == expected["results"][task][f"{metric},none"]
        for (value, greedy), (their_value, their_greedy) in zip(
            answers(found, CHOICE), answers(expected, CHOICE), strict=True
        ):
            assert value == pytest.approx(their_value, abs=1e-4)
            assert greedy == their_greedy
        assert answers(found, GENERATION) == answers(expected, GENERATION)
        assert any(answers(found, GENERATION))
        assert found["results"][ROLLING]["bits_per_byte,none"] > 0


def test_choices_of_a_quantized_directory(tasks: TaskManager, tmp_path: Path) -> None:
    """Beside the harness' backend on transformers' model with the same weights, dequantized to float32."""
    write_plan(plan_quantization(embedded_model(), "int4"), tmp_path / "quantized")
    weights = load_model(tmp_path / "quantized").weights
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(weights[name], np.float32)))
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    expected = run(HFLM(model, tokenizer=tokenizer, max_length=MAX_LENGTH), tasks, CHOICE)
    found = run(BambaQuantLM(tmp_path / "quantized", max_length=MAX_LENGTH), tasks, CHOICE)
    assert found["results"][CHOICE]["acc,none"] == expected["results"][CHOICE]["acc,none"]
    values, theirs = ([value for value, _ in answers(each, CHOICE)] for each in (found, expected))
    assert values == pytest.approx(theirs, abs=1e-4)


def test_whole_texts(ours: BambaQuantLM, theirs: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the BOS that the harness' backend puts before the text besides the prefix, and scores."""
    texts = ["", "The rope", " ".join(f"line {n} of the text," for n in range(60))]
    requests = [request("loglikelihood_rolling", text) for text in texts]
    monkeypatch.setattr(theirs, "add_bos_token", False)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert len(theirs.tok_encode(texts[-1])) > 2 * MAX_LENGTH
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=1e-3)
    marked = request("loglikelihood_rolling", "<|begin_of_text|>The rope")
    assert ours.loglikelihood_rolling([marked]) == pytest.approx(expected[1:2], abs=1e-4)


CONTEXTS = [
    ("", "The rope"),
    ("", " the"),
    ("A space at the end ", "of it"),
    ("<|begin_of_text|>Its own BOS", " is the only one"),
    ("The same context", " once"),
    ("The same context", " or twice, with more words"),
    ("The same context", " once"),
]


def test_texts_become_the_harness_tokens(ours: BambaQuantLM, theirs: HFLM) -> None:
    requests = [request("loglikelihood", *pair) for pair in CONTEXTS]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    for text in ("", "a b", "<|begin_of_text|>a"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(
            text, add_special_tokens=False
        )
    assert (ours.eot_token_id, ours.prefix_token_id) == (theirs.eot_token_id, theirs.prefix_token_id)
    assert BambaQuantLM(embedded_model()).max_length == HFLM.max_length.fget(_without_limit(theirs))


def _without_limit(model: HFLM) -> HFLM:
    import copy

    unlimited = copy.copy(model)
    unlimited._max_length = None
    return unlimited


@pytest.mark.filterwarnings("ignore:.*lost their beginning")
def test_the_harness_cache_answers_the_second_time(
    ours: BambaQuantLM, tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BambaQuantLM(embedded_model(), max_length=MAX_LENGTH)
    first = run(model, tasks, *TASKS, use_cache=str(tmp_path / "cache"), limit=2)
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        monkeypatch.setattr(model, name, None)
    again = run(model, tasks, *TASKS, use_cache=str(tmp_path / "cache"), limit=2)
    assert first["results"] == again["results"]


def test_sampling_differs_between_requests_and_repeats_with_the_seed(ours: BambaQuantLM) -> None:
    arguments = {"until": [], "do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_gen_toks": 8}
    requests = [request("generate_until", "The rope", arguments)] * 3
    found = ours.generate_until(requests)
    assert len(set(found)) == 3
    assert found == ours.generate_until(requests)
    one_by_one = BambaQuantLM(embedded_model(), batch_size=1)
    assert len(set(one_by_one.generate_until(requests))) == 3
    other_seed = BambaQuantLM(embedded_model(), seed=7)
    assert other_seed.generate_until(requests) != found


def test_model_info_names_the_file(ours: BambaQuantLM) -> None:
    info = ours.get_model_info()
    assert info["model_num_parameters"] > 1e6
    assert info["model_path"] == str(embedded_model())
    assert info["model_type"] == "bf16"
    assert json.dumps(info)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, ["batch_size", "found: 0", '"auto"']),
        ({"max_length": "long"}, ["max_length", "found: long"]),
        ({"gpu_layers": 3}, ["no such argument", "found: gpu_layers", "pretrained, tokenizer, dtype"]),
        ({"dtype": "q4"}, ["unknown dtype"]),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(BambaQuantError) as error:
        BambaQuantLM(embedded_model(), **arguments)
    assert all(word in str(error.value) for word in words)


def test_requests_that_cannot_be_run(ours: BambaQuantLM) -> None:
    with pytest.raises(TaskError, match="found: num_beams=4"):
        ours.generate_until([request("generate_until", "a", {"until": ["."], "num_beams": 4})])
    with pytest.raises(TaskError, match=f"less than max_length {MAX_LENGTH}"):
        ours.generate_until([request("generate_until", "a", {"until": [], "max_gen_toks": MAX_LENGTH})])
    with pytest.raises(TaskError, match=f"more than the model takes\n  found: {2 * MAX_LENGTH} tokens"):
        ours.loglikelihood([request("loglikelihood", "a", " long" * 2 * MAX_LENGTH)])


def test_a_context_that_is_cut_is_told(ours: BambaQuantLM) -> None:
    with pytest.warns(UserWarning, match="1 of 2 contexts lost their beginning to fit in 100 tokens"):
        ours.loglikelihood(
            [request("loglikelihood", "long " * 200, "a"), request("loglikelihood", "a", " b")]
        )


TEMPLATE = """{{ bos_token }}{%- for m in messages %}
{%- if m.role == 'system' and refuse is defined %}{{ raise_exception('no system message') }}{% endif %}
<|{{ m | tojson if m.role == 'user' else m.role }}|>
{% generation %}{{ m.content | trim }}{% endgeneration %}{{ eos_token }}
{%- if loop.index > 9 %}{% break %}{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " 2 < 3? "},
    {"role": "assistant", "content": "Yes, é "},
]


def test_chat_templates(theirs: HFLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers renders them; from a directory and from a GGUF file."""
    directory = shutil.copytree(embedded_model(), tmp_path / "model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    models = [BambaQuantLM(directory), BambaQuantLM(to_gguf(directory, tmp_path / "f32.gguf", "f32"))]
    monkeypatch.setattr(theirs.tokenizer, "chat_template", TEMPLATE)
    for prompt, chat in ((True, CHAT[:2]), (False, CHAT)):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt)
        for model in models:
            assert model.chat_template(True) == TEMPLATE
            assert model.apply_chat_template(chat, add_generation_prompt=prompt) == expected
    refusing = TEMPLATE.replace("refuse is defined", "true")
    (directory / "chat_template.jinja").write_text(refusing)
    monkeypatch.setattr(theirs.tokenizer, "chat_template", refusing)
    with pytest.warns(UserWarning, match="no system message"):
        found = BambaQuantLM(directory).apply_chat_template(CHAT)
    assert found == theirs.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}"],
)
def test_templates_run_in_a_sandbox(template: str, tmp_path: Path) -> None:
    directory = shutil.copytree(embedded_model(), tmp_path / "model")
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(TaskError, match="the chat template cannot be applied"):
        BambaQuantLM(directory).apply_chat_template(CHAT)


def test_a_model_without_a_template(ours: BambaQuantLM) -> None:
    with pytest.raises(BambaQuantError, match="no such chat template"):
        ours.apply_chat_template(CHAT)
    assert ours.chat_template(False) is None
