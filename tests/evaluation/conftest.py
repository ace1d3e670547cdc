"""The embedded model's files, a text for them, and one evaluation that many tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.result import Evaluation
from bamba_quant.evaluation.run import EvaluationOptions
from tests.support.conversion import to_gguf

OPTIONS = EvaluationOptions(
    ctx=64, chunks=10, resamples=1000, floor_chunks=4, drift_chunks=2, backend="numba"
)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "help.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics))[:20_000], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("files")
    return {
        name: to_gguf(embedded_model(), directory / f"{name}.gguf", name)
        for name in ("f32", "bf16", "q8_0", "q4_k_m")
    }


@pytest.fixture(scope="session")
def evaluation(files: dict[str, Path], text: Path) -> Evaluation:
    return evaluate(embedded_model(), [files["q8_0"], files["q4_k_m"]], text, OPTIONS)
