"""A quantized directory has the original's small files, whatever their place, and none by a link from elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError
from bamba_quant.files.reading import check_link
from bamba_quant.metadata.general import read_general
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan

TEMPLATES = {
    "chat_template.jinja": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{% for m in messages %}[{{ m.role }}+]{{ m.content }}{% endfor %}",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "m"
    shutil.copytree(embedded_model(), place)
    return place


def in_the_cache(model: Path, cache: Path) -> Path:
    """The model as huggingface_hub stores it: links to blobs."""
    stored = cache / "models--acme--Mill-1B"
    snapshot, blobs = stored / "snapshots" / ("0123456789" * 4), stored / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(each for each in model.rglob("*") if each.is_file())):
        name = file.relative_to(model)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / name).symlink_to(os.path.relpath(blobs / f"{number:064x}", (snapshot / name).parent))
    return snapshot


def with_templates(model: Path) -> Path:
    (model / "additional_chat_templates").mkdir()
    for name, text in TEMPLATES.items():
        (model / name).write_text(text)
    return model


@pytest.mark.parametrize("cached", [False, True])
def test_chat_templates(cached: bool, model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = with_templates(model)
    source = in_the_cache(source, tmp_path / "hub") if cached else source
    out = tmp_path / "out"
    for overwrite in (False, True):
        write_plan(plan_quantization(source, "fp8-dynamic"), out, overwrite=overwrite)
    assert not [file for file in out.rglob("*") if file.is_symlink()]
    assert AutoTokenizer.from_pretrained(out).chat_template == {
        "default": TEMPLATES["chat_template.jinja"],
        "tool_use": TEMPLATES["additional_chat_templates/tool_use.jinja"],
    }


def test_the_name_in_the_hubs_cache(model: Path, tmp_path: Path) -> None:
    (model / "README.md").unlink()
    snapshot = in_the_cache(model, tmp_path / "hub")
    card = plan_quantization(snapshot, "fp8-dynamic").files["README.md"].decode()
    assert "base_model: acme/Mill-1B\n" in card
    assert "\n# Mill-1B\n" in card
    general = read_general(snapshot, 10**9, architecture="bamba", model_name=None, overrides=None)
    assert general.values["general.name"].value == "Mill 1B"
    assert general.values["general.organization"].value == "Acme"


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "README.md", "tokenizer.json", "NOTICE.txt", *TEMPLATES],
    ids=lambda name: name.rpartition("/")[2],
)
def test_links_that_leave_the_model(name: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    file = with_templates(model) / name
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    with pytest.raises(
        CheckpointError, match=rf"{file.name} is a symbolic link[\s\S]*{secret}[\s\S]*fix|mend"
    ):
        plan_quantization(model, "fp8-dynamic")
    if name in TEMPLATES:
        with pytest.raises(CheckpointError, match="symbolic link"):
            plan_conversion(model)


def test_links_into_other_caches_and_through_directories(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "hub" / "models--other--X" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("{}")
    snapshot = in_the_cache(model, tmp_path / "hub")
    (snapshot / "LICENSE").symlink_to(other / "0")
    with pytest.raises(CheckpointError, match="symbolic link"):
        plan_quantization(snapshot, "fp8-dynamic")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("mine")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        plan_quantization(model, "fp8-dynamic")


@pytest.mark.parametrize("digits", [40, 64])
def test_links_of_a_local_directory_into_the_cache(digits: int, tmp_path: Path) -> None:
    """As older versions of huggingface_hub downloaded into a directory."""
    blobs = tmp_path / "hub" / "models--acme--Mill-1B" / "blobs"
    directory = tmp_path / "m"
    for place in (blobs, directory):
        place.mkdir(parents=True)
    for name in ("a" * digits, "a" * (digits - 1), "a" * digits + "\n", "g" * digits):
        (blobs / name).touch()
        (directory / name).symlink_to(blobs / name)
    check_link(directory / ("a" * digits), directory)
    for name in ("a" * (digits - 1), "a" * digits + "\n", "g" * digits):
        with pytest.raises(CheckpointError, match="leaves the model"):
            check_link(directory / name, directory)


def test_a_loop_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Path:
        raise RuntimeError("Symlink loop")  # Python 3.13 no longer raises it

    monkeypatch.setattr(Path, "resolve", refuse)
    with pytest.raises(CheckpointError, match=r"LICENSE") as refused:
        check_link(tmp_path / "LICENSE", tmp_path)
    assert refused.value.found and refused.value.expected and refused.value.fix


def test_links_that_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "texts").mkdir()
    (model / "texts" / "free").write_text("free")
    (model / "LICENSE").symlink_to("texts/free")
    shutil.move(model / "model.safetensors", tmp_path / "weights")
    (model / "model.safetensors").symlink_to(tmp_path / "weights")
    plan = plan_quantization(model, "fp8-dynamic")
    assert plan.files["LICENSE"] == b"free"


def test_what_is_not_copied_is_named(model: Path) -> None:
    (model / "runs").mkdir()
    for name in ("training_args.bin", "notes.txt", "x.gguf", "adapter.safetensors"):
        (model / name).write_text("x")
    (model / "NOTICE").symlink_to("nowhere")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.txt").write_text("x")
    plan = plan_quantization(model, "fp8-dynamic")
    (note,) = (note for note in plan.notes if note.startswith("not copied"))
    # The note shows the first of them.
    for name in ("NOTICE", "adapter.safetensors", "additional_chat_templates/x.txt", "and 2 more"):
        assert name in note
