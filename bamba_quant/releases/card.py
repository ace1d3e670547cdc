"""What a release says of itself: for each repository a model card, the picture, and the checksums of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bamba_quant import __version__
from bamba_quant.evaluation.result import Evaluation
from bamba_quant.files.names import CARD
from bamba_quant.metadata.model_card import read_front_matter
from bamba_quant.metadata.model_name import name_of
from bamba_quant.releases.make import plan_of, planned_imatrix
from bamba_quant.releases.names import GGUF, gguf_name, type_of
from bamba_quant.releases.state import (
    MadeFile,
    check_not_foreign,
    finished_record,
    is_own,
    model_path,
    refuse_foreign,
)
from bamba_quant.releases.tasks import CHECKSUMS, PICTURE, REPORT, Release, Task
from bamba_quant.report import wording
from bamba_quant.report.charts.size_divergence import size_divergence
from bamba_quant.report.frontier import frontier_lines
from bamba_quant.report.json_report import read_report
from bamba_quant.report.markdown import code, figures_table, literal
from bamba_quant.report.page import as_svg
from bamba_quant.writers.atomic import write_text

_TITLE = "File size against mean KL divergence"
FIGURES = ("kld_mean", "ppl", "ppl_ratio", "kld_99_9", "same_top")  # as many as a page of the Hub is wide
# Of the base's card, what holds for its quantized files as well.
_KEPT = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class About:
    """What cards say of the base and of where the release will be: ``repository`` is owner/name, or empty."""

    base_model: str
    licence: str | None = None
    repository: str = ""

    def repository_of(self, release: Release, folder: str) -> str:
        """The repository of one of the release's folders: the name on the Hub, or the folder's where none was given."""
        return self.repository + folder.removeprefix(release.name) if self.repository else folder


def about(release: Release, base_model: str | None, licence: str | None, repository: str = "") -> About:
    """``About`` with the base's name on the Hub taken from its place in the Hub's cache where none is given."""
    return About(base_model or name_of(release.model).repository, licence, repository)


def notes_on(release: Release, told: About) -> Iterator[str]:
    """What the cards will lack."""
    if "/" not in told.base_model:
        yield f"the cards name the base {told.base_model}, which is not a name on the Hub: give --base-model OWNER/NAME"
    if not (told.licence or "license" in _base_card(release)):
        yield "the base's card states no licence, and neither do those of the release: give --license"


def write_cards(release: Release, told: About) -> dict[str, list[Path]]:
    """Write card, picture and checksums into every folder; all files of each folder, for an upload.

    The bytes follow from the files, the figures and ``told`` alone. Raises ``ReleaseError`` where a task is not done.
    """
    evaluation = wording.by_size(read_evaluation(release))
    drawn = as_svg(size_divergence(evaluation, 800.0))
    # The page around it may be dark where the reader's system is light.
    picture = drawn.replace('class="chart"', 'class="chart" style="background: var(--paper)"', 1)
    files: dict[str, list[Path]] = {}
    for key, folder in release.folders.items():
        made = [each for task in _tasks_of(release, key) for each in _files(release, task)]
        card = _card(release, told, key, made, evaluation)
        texts = {PICTURE: picture, CARD: card}
        sums = {Path(each.path).relative_to(folder).as_posix(): each.sha256 for each in made}
        sums |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        texts[CHECKSUMS] = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items()))
        place = release.directory / folder
        for name, text in texts.items():
            write_text(place / name, text, overwrite=True)
        files[folder] = [place / name for name in sorted({*sums, CHECKSUMS})]
    return files


def check_files_are_own(release: Release) -> None:
    """Raise ``OutputError`` where the release would replace an output, a report or a card that it did not make."""
    for task in release.tasks:
        check_not_foreign(release, task)
    for key, folder in release.folders.items():
        if not any(is_own(release, task) for task in _tasks_of(release, key)):
            refuse_foreign(release.directory / folder / name for name in (CARD, PICTURE, CHECKSUMS))


def read_evaluation(release: Release) -> Evaluation:
    """The release's evaluation, with the verdict of its gates."""
    return read_report(release.directory / REPORT / "report.json")


def _tasks_of(release: Release, key: str) -> list[Task]:
    """The tasks whose files lie in the folder of a scheme or of ``GGUF``."""
    if key == GGUF:
        return [task for task in release.tasks if task.kind in ("imatrix", "gguf")]
    return [task for task in release.tasks if task.name == key]


def _files(release: Release, task: Task) -> tuple[MadeFile, ...]:
    return finished_record(release, task.name).files


def _card(release: Release, told: About, key: str, made: Sequence[MadeFile], evaluation: Evaluation) -> str:
    repository = told.repository_of(release, release.folders[key])
    body = [
        f"# {literal(repository.rpartition('/')[2])}",
        _origin(release, told, key),
        "## What each file lost",
        _measured(evaluation),
        figures_table(evaluation, FIGURES),
        f"![{_TITLE}]({PICTURE})",
        "\n".join(f"- {literal(line)}" for line in frontier_lines(evaluation)),
        "## Use",
        _use_gguf(release, told, repository) if key == GGUF else _use_directory(release, key, repository),
        "## How the files were made",
        *_made(release, key, evaluation),
        f"`sha256sum -c {CHECKSUMS}` checks every file.",
    ]
    matter = yaml.safe_dump(_front_matter(release, told, key), sort_keys=False, allow_unicode=True)
    return f"---\n{matter}---\n\n" + "\n\n".join(part for part in body if part) + "\n"


def _front_matter(release: Release, told: About, key: str) -> dict[str, Any]:
    kept = {name: value for name, value in _base_card(release).items() if name in _KEPT}
    if told.licence:
        kept = {"license": told.licence} | {name: value for name, value in kept.items() if name == "language"}
    tags = ["gguf", "llama.cpp"] if key == GGUF else ["compressed-tensors", key]
    if key != GGUF and "torchao" in key:
        tags = ["torchao", key]
    return {
        "base_model": told.base_model,
        "base_model_relation": "quantized",
        **kept,
        "pipeline_tag": "text-generation",
        "library_name": "gguf" if key == GGUF else "transformers",
        "tags": [*tags, *(["imatrix"] if release.preset.imatrix_chunks else []), "bamba-quant"],
    }


def _base_card(release: Release) -> Mapping[str, Any]:
    card = release.model / CARD
    return read_front_matter(card) if card.is_file() else {}


def _origin(release: Release, told: About, key: str) -> str:
    base = literal(told.base_model)
    if "/" in told.base_model:
        base = f"[{base}](https://huggingface.co/{told.base_model})"
    what = "GGUF files" if key == GGUF else f"{literal(key)} weights for transformers and vLLM"
    others = [told.repository_of(release, folder) for each, folder in release.folders.items() if each != key]
    also = f" The same release has {wording.listed([code(other) for other in others])}." if others else ""
    return f"{what} of {base}, made by bamba-quant {__version__}.{also}"


def _measured(evaluation: Evaluation) -> str:
    text = evaluation.text
    return (
        f"Each file against the original on {text.scored:,} tokens of {literal(text.file)} (SHA-256 "
        f"{code(text.sha256[:16])}…), in {text.chunks} chunks of {text.ctx}; 95 % intervals by paired bootstrap over "
        "chunks. KLD is the Kullback-Leibler divergence of the next token's distribution from the original's, in nats."
    )


def _use_gguf(release: Release, told: About, repository: str) -> str:
    tasks = {
        type_of(gguf_name(release.name, task.name)): task for task in release.tasks if task.kind == "gguf"
    }
    kind = "Q4_K_M" if "Q4_K_M" in tasks else next(iter(tasks))
    if not told.repository:
        return f"```sh\nllama-cli -m {model_path(release, tasks[kind]).name}\n```"
    lines = (
        f"llama-cli -hf {repository}:{kind}",
        f"ollama run hf.co/{repository}:{kind}",
        f"lms get https://huggingface.co/{repository}@{kind.lower()}",
    )
    others = ", ".join(code(f":{each}") for each in tasks if each != kind)
    return "```sh\n" + "\n".join(lines) + "\n```" + (f"\n\nLikewise {others}." if others else "")


def _use_directory(release: Release, scheme: str, repository: str) -> str:
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="bfloat16")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n```'
    )


def _made(release: Release, key: str, evaluation: Evaluation) -> Iterator[str]:
    """Importance matrix, tuning, and of a directory the account of its own plan."""
    preset, texts = release.preset, wording.listed([literal(each.name) for each in release.calibrate])
    if preset.imatrix_chunks:
        where = f" ({code(f'{release.name}-imatrix.gguf')})" if key == GGUF else ""
        yield (
            f"Each column's errors are weighed by an importance matrix{where}, measured on at most "
            f"{preset.imatrix_chunks} chunks of 512 tokens of {texts}."
        )
    for candidate in evaluation.candidates:
        model = candidate.model
        if model.tuned and release.folders[key] in Path(model.path).parts:
            yield f"{literal(model.label)}: {literal(model.tuned.line())}."
    if key != GGUF:
        plan = plan_of(release, Task(key, "directory"), planned_imatrix(release))
        yield plan.files[CARD].decode("utf-8", "replace").rpartition("## Quantization\n\n")[2].strip()
