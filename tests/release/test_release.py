"""A release as the command makes it: its files and cards, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import bamba_quant
from bamba_quant.calibration import tune
from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.checkpoint.imatrix import read_imatrix
from bamba_quant.metadata.model_card import read_front_matter
from bamba_quant.metadata.tune_record import read_record
from bamba_quant.releases import make, state
from bamba_quant.releases.card import FIGURES
from bamba_quant.releases.preset import Preset
from bamba_quant.releases.tasks import Release
from bamba_quant.report.json_report import read_report
from bamba_quant.report.markdown import figures_table
from bamba_quant.report.wording import by_size
from tests.release.conftest import REPOSITORY, Material, published
from tests.support.command import run
from tests.support.tuning import tune_quickly

GGUF, FP8 = "mini-GGUF", "mini-FP8"
FILES = {
    GGUF: {
        "README.md", "SHA256SUMS", "mini-Q8_0.gguf", "mini-h-Q4_K_M.gguf", "mini-imatrix.gguf", "size-divergence.svg",
    },
    FP8: {
        "README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "size-divergence.svg",
        "tokenizer.json", "tokenizer_config.json",
    },
}  # fmt: skip


def test_files_and_checksums(finished: Path) -> None:
    for folder, names in FILES.items():
        assert {file.name for file in (finished / folder).iterdir()} == names
        done = subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"],
            cwd=finished / folder,
            capture_output=True,
            check=True,
        )
        assert len(done.stdout.splitlines()) == len(names) - 1
    # Nothing says where this machine keeps its files.
    sums = read_imatrix(finished / GGUF / "mini-imatrix.gguf")
    assert sums.dataset == "calibration.txt"
    checkpoint = open_checkpoint(finished / GGUF / "mini-h-Q4_K_M.gguf")
    assert checkpoint.metadata["quantize.imatrix.file"].value == "mini-imatrix.gguf"
    for file in published(finished):
        assert str(finished.parent).encode() not in (finished / file).read_bytes(), file


def test_the_importance_matrix_is_used(finished: Path, material: Material, tmp_path: Path) -> None:
    (plain,) = bamba_quant.convert(material.place / "mini", "q4_k_m_h", tmp_path / "plain.gguf")
    weighed = finished / GGUF / "mini-h-Q4_K_M.gguf"
    assert plain.read_bytes() != weighed.read_bytes()
    imatrix = finished / GGUF / "mini-imatrix.gguf"
    (fp8, *_) = bamba_quant.quantize(material.place / "mini", tmp_path / "fp8", imatrix=imatrix)
    assert fp8.read_bytes() == (finished / FP8 / "model.safetensors").read_bytes()


def test_tuned_files_say_so(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "tune", tune_quickly)
    preset = tmp_path / "tuned.toml"
    preset.write_text("types = ['q4_k_m']\ntune = ['q4_k_m']\nimatrix_chunks = 0\nctx = 64\nchunks = 8\n")
    material.make(tmp_path / "r", "--preset", preset)
    record = read_record(open_checkpoint(tmp_path / "r" / GGUF / "mini-Q4_K_M.gguf"))
    assert record is not None and record.line() in _plain((tmp_path / "r" / GGUF / "README.md").read_text())
    assert not list((tmp_path / "r").rglob("*.tuning"))


def _plain(markdown: str) -> str:
    return markdown.replace("\\", "")


def test_cards_as_the_hub_reads_them(finished: Path) -> None:
    report = read_report(finished / "report" / "report.json")
    for folder, library in ((GGUF, "gguf"), (FP8, "transformers")):
        file = finished / folder / "README.md"
        card = ModelCard.load(file)
        found = card.data.to_dict()
        assert found["base_model"] == REPOSITORY and found["base_model_relation"] == "quantized"
        assert (found["license"], found["language"]) == ("apache-2.0", ["en"])
        assert (found["library_name"], found["pipeline_tag"]) == (library, "text-generation")
        assert "bamba-quant" in found["tags"] and found == read_front_matter(file)
        assert f"# {folder}\n" in card.text and "](size-divergence.svg)" in card.text
        assert figures_table(by_size(report), FIGURES) in card.text
    assert "matrices" in (finished / FP8 / "README.md").read_text() and "fp8-dynamic" in card.text


def test_what_is_finished_is_not_made_again(finished: Path, material: Material) -> None:
    before = {
        file: file.stat().st_mtime_ns
        for file in finished.rglob("*")
        if file.suffix in (".gguf", ".safetensors")
    }
    done = material.make(finished, "--json")
    assert done.stderr.count("was done before") == 5 and "done\n" not in done.stderr.replace(
        "done before\n", ""
    )
    assert json.loads(done.stdout)["passed"] is True
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    finished: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before and after records are written: before, a task's output is there and nothing says so."""

    class Killed(BaseException):
        pass

    write, count = state.write_record, [0]

    def dying(*given: Any) -> None:
        count[0] += 1
        if count[0] % 2:
            write(*given)
        raise Killed

    directory = tmp_path / "release"
    subprocess.run(["cp", "-a", finished, directory], check=True)
    for name in ("q8_0", "fp8-dynamic", "evaluate"):  # tuning is slow, and the imatrix decides what follows
        (directory / ".release" / f"{name}.json").unlink()
    monkeypatch.setattr(make, "write_record", dying)
    for _ in range(4):
        with pytest.raises(Killed):
            material.make(directory)
    monkeypatch.setattr(make, "write_record", write)
    done = material.make(directory)
    assert done.stderr.count("was done before") == 4 and "evaluate: done" in done.stderr
    assert published(directory) == published(finished)


def test_other_settings_are_an_error_until_they_are_to_replace(
    finished: Path, material: Material, tmp_path: Path
) -> None:
    directory = tmp_path / "release"
    subprocess.run(["cp", "-a", finished, directory], check=True)
    other = tmp_path / "other.toml"
    other.write_text((material.place / "preset.toml").read_text().replace("chunks = 36", "chunks = 35"))
    words = [*material.words(directory), "--preset", other]
    refused = run(*words, code=2)
    assert "evaluate of this release was made with other settings" in refused.stderr
    assert "different now: chunks" in refused.stderr and "--overwrite" in refused.stderr
    done = run(*words, "--overwrite")
    assert done.stderr.count("was done before") == 4 and "evaluate: done" in done.stderr
    file = directory / GGUF / "mini-Q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "a file of the release was changed since it was made" in run(*words, code=2).stderr
    file.unlink()
    assert "q8_0: done" in run(*words).stderr
    assert published(directory)[f"{GGUF}/mini-Q8_0.gguf"] == published(finished)[f"{GGUF}/mini-Q8_0.gguf"]


def test_another_revision_is_another_model(material: Material, tmp_path: Path) -> None:
    """Weights are known by the commit, whatever their times are, or by their times; small files by content."""

    def found(model: Path) -> Any:
        preset = Preset("p", types=("q8_0",), imatrix_chunks=0)
        release = Release(model, tmp_path / "r", preset, "mini", material.place / "text.txt")
        return release.settings(release.tasks[0])["model"]

    snapshots = tmp_path / "models--some-org--mini" / "snapshots"
    snapshots.mkdir(parents=True)
    first, second, plain = snapshots / "01", snapshots / "02", tmp_path / "mini"
    for model in (first, second, plain):
        subprocess.run(["cp", "-a", material.place / "mini", model], check=True)
    before = {model: found(model) for model in (first, plain)}
    assert found(second) != before[first]
    for model in (first, plain):
        os.utime(model / "model.safetensors", ns=(0, 0))
        assert (found(model) == before[model]) == (model == first)
        before[model] = found(model)
        for name in ("README.md", "tokenizer_config.json"):
            (model / name).write_text("{}")
            assert found(model) != before[model]
            before[model] = found(model)


def test_a_file_that_is_split_now_replaces_the_whole_one(material: Material, tmp_path: Path) -> None:
    """What was made is measured and described, not a file of an earlier run or of somebody else."""
    preset, whole = tmp_path / "p.toml", tmp_path / "r" / GGUF / "mini-Q8_0.gguf"
    text = "types = ['q8_0']\nimatrix_chunks = 0\nctx = 64\nchunks = 4\n"
    preset.write_text(text)
    material.make(tmp_path / "r", "--preset", preset)
    preset.write_text(text + "split_bytes = 2_000_000\n")
    material.make(tmp_path / "r", "--preset", preset, "--overwrite")
    assert not whole.exists()
    whole.write_bytes(b"of somebody else")
    (tmp_path / "r" / ".release" / "evaluate.json").unlink()
    material.make(tmp_path / "r", "--preset", preset)
    first = next(whole.parent.glob("mini-Q8_0-00001-of-*.gguf"))
    assert f"llama-cli -m {first.name}\n" in (whole.parent / "README.md").read_text()
    report = read_report(tmp_path / "r" / "report" / "report.json")
    assert [each.model.path for each in report.candidates] == [str(first)]


@pytest.mark.parametrize(
    "name",
    [
        f"{GGUF}/mini-h-Q4_K_M.gguf", f"{GGUF}/mini-Q8_0-00001-of-00002.gguf", f"{GGUF}/README.md",
        f"{GGUF}/mini-imatrix.gguf", f"{FP8}/mine.txt", "report/report.json",
    ],
)  # fmt: skip
def test_what_the_release_did_not_make_stays(material: Material, tmp_path: Path, name: str) -> None:
    file = tmp_path / "r" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of somebody else")
    refused = material.make(tmp_path / "r", code=2)
    assert "would replace what it did not make" in refused.stderr and "--overwrite" in refused.stderr
    assert [each for each in (tmp_path / "r").rglob("*") if each.is_file()] == [file]
    assert file.read_bytes() == b"of somebody else"


@pytest.mark.parametrize("damage", [{"settings": []}, {"files": [5]}, {"seconds": None}, {"n_bytes": "1"}])
def test_a_damaged_record(finished: Path, material: Material, tmp_path: Path, damage: dict[str, Any]) -> None:
    subprocess.run(["cp", "-a", finished, tmp_path / "r"], check=True)
    file = tmp_path / "r" / ".release" / "q8_0.json"
    record = json.loads(file.read_text())
    (record["files"][0] if "n_bytes" in damage else record).update(damage)
    file.write_text(json.dumps(record))
    refused = material.make(tmp_path / "r", code=2).stderr
    assert "the record of a task is damaged" in refused and "remove it" in refused


def test_a_lock_that_another_process_has_is_told(tmp_path: Path) -> None:
    release = Release(tmp_path, tmp_path, Preset("p"), "mini", tmp_path)
    notes: list[str] = []

    def told(note: str) -> None:
        notes.append(note)
        opened.close()

    opened = ExitStack()
    opened.enter_context(state.locked(release, "q8_0"))
    with state.locked(release, "q8_0", told):
        assert notes == ["q8_0: another process works on it; waiting for it to end"]


def test_a_gate_that_fails(finished: Path, material: Material, tmp_path: Path) -> None:
    directory = tmp_path / "release"
    subprocess.run(["cp", "-a", finished, directory], check=True)
    gates = tmp_path / "gates.toml"
    gates.write_text("[default]\nmax-kld = 1e-2\n")
    done = material.make(directory, "--gates", gates, "--overwrite", "--upload", "some-org/mini", code=1)
    assert "a gate failed: nothing was uploaded" in done.stderr


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("types = ['q4km']", "did you mean q4_k_m"),
        ("types = ['q4_k_m']\nchunk = 3", "unknown key of a preset: chunk; did you mean chunks"),
        ("types = ['q4_k_m']\nchunks = '3'", "the value of chunks is of another kind"),
        ("types = ['q4_k_m', 'q4_k_m']", "each once"),
        ("schemes = ['nvfp4a4']", "stores what enters each matrix at most"),
        ("chunks = 3", "a preset has types or schemes"),
        ("types = ['q4_k_m']\ntune = ['q8_0']", "tune names a file that is not made"),
        ("types = ['q4_k_m']\ntune_options = { steps = '3' }", "steps = '3'"),
        ("types = ['q4_k_m']\ntune_options = { seed = true }", "a tuning option of another kind"),
        ("types = ['q4_k_m']\ntune_options = { lr = nan }", "a finite number"),
        ("types = ['q4_k_m']\ntune_options = { max_memory = 3 }", "unknown tuning option"),
        ("types = ['q4_k_m']\ntune_options = { stepps = 3 }", "did you mean steps"),
        ("types = ['q4_k_m']\n[gates]\ndefault = { max-kd = 1 }", "unknown gate"),
        ("types = ['q4_k_m', 'q4_k_m_h']\nimatrix_chunks = 0", "several files of the release answer to :Q4_K_M"),
        ("types = ['q4_k_m']\nctx = 4000\nimatrix_chunks = 0", "less than two chunks"),
    ],
)  # fmt: skip
def test_presets_that_are_errors(preset: str, said: str, material: Material, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(preset)
    done = run(*material.words(tmp_path / "release"), "--preset", tmp_path / "p.toml", code=2)
    assert said in done.stderr.replace("\n    ", " ") and "Traceback" not in done.stderr
    assert not (tmp_path / "release").exists()


def test_texts_that_are_errors(material: Material, tmp_path: Path) -> None:
    place = material.place
    base = ["release", place / "mini", tmp_path / "r", "--preset", "small", "--text", place / "text.txt"]
    assert "asks for an importance matrix" in run(*base, code=2).stderr
    assert "one that the files learn from" in run(*base, "--calibrate", place / "text.txt", code=2).stderr
    assert "there is no such text" in run(*base, "--calibrate", place / "none.txt", code=2).stderr
    assert "the model lies in the release's directory" in run(*base[:2], place, *base[3:], code=2).stderr
    assert "unknown preset 'smal'; did you mean small?" in run(*base, "--preset", "smal", code=2).stderr
    assert not (tmp_path / "r").exists()


def test_a_dry_run_tells_the_sizes_and_writes_nothing(
    finished: Path, material: Material, tmp_path: Path
) -> None:
    told = json.loads(material.make(tmp_path / "r", "--dry-run", "--json").stdout)
    assert not (tmp_path / "r").exists()
    for each in told["files"]:
        file = finished / os.path.relpath(each["file"], tmp_path / "r")
        if each["task"] == "imatrix" or file.name in ("README.md",):
            assert abs(each["bytes"] - file.stat().st_size) < 60_000
        elif file.suffix == ".gguf":  # and the records of tuning and of the importance matrix
            assert 0 < file.stat().st_size - each["bytes"] < 2_000
        else:
            assert each["bytes"] == file.stat().st_size
    assert told["peak_disk"] > told["bytes"] and told["seconds"].keys() >= {"imatrix", "evaluate", "q8_0"}
