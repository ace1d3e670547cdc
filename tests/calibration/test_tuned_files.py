"""Tuned files hold what the tuning made and nothing else of it, appear whole or not at all, and say how they came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from bamba_quant.calibration.tuned_output import write_tuned_directory, write_tuned_gguf
from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError, OutputError
from bamba_quant.evaluation.models import describe, open_models
from bamba_quant.metadata.tune_record import Tuned, read_record
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_quant.writers.resumable import partial_of
from tests.planning.test_quantize import WIDE
from tests.support import directories
from tests.support.conversion import assert_same_tensors
from tests.support.models import random_bamba, save_checkpoint
from tests.support.tuning import RECORD, WORSE, StandIn, names_left

SCHEMES = ("fp8-dynamic", "w4a16-g128", "torchao-int4-g128")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(random_bamba(**WIDE), tmp_path_factory.mktemp("model") / "m", shards=2)


def tuned_gguf(target: Path, tune: Any, split: int | None = None, **options: Any) -> tuple[Path, ...]:
    planned = plan_conversion(
        embedded_model(), outtype="q4_k_m", outfile=target, vocab=False, split_max_bytes=split
    )
    return write_tuned_gguf(planned, planned.outfile, tune, **options)[0]


def plain_gguf(target: Path, split: int | None = None) -> tuple[Path, ...]:
    planned = plan_conversion(
        embedded_model(), outtype="q4_k_m", outfile=target, vocab=False, split_max_bytes=split
    )
    return write_plan(planned, planned.outfile)


def test_a_tuned_gguf_holds_the_tuned_tensors_and_its_record(tmp_path: Path) -> None:
    tune = StandIn()
    (file,) = tuned_gguf(tmp_path / "tuned.gguf", tune)
    (plain,) = plain_gguf(tmp_path / "plain.gguf")
    assert names_left(tmp_path) == ["plain.gguf", "tuned.gguf"]
    found, before = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(str(f)).tensors} for f in (file, plain)
    )
    assert found == before | {name: raw.tobytes() for name, raw in tune.tensors.items()}
    assert all(found[name] != before[name] for name in tune.tensors)
    assert read_record(open_checkpoint(file)) == RECORD
    assert read_record(open_checkpoint(plain)) is None
    assert inspect_path(file).tuned == RECORD
    fields = gguf.GGUFReader(str(file)).fields
    assert fields["bamba_quant.tune.sha256"].contents() == list(RECORD.sha256)
    assert fields["bamba_quant.tune.held_out_kld_after"].contents() == 0.25


def test_files_say_what_they_are(tmp_path: Path) -> None:
    named = {}
    for outtype in ("q4_k_m", "q4_k_m_h"):
        planned = plan_conversion(embedded_model(), outtype=outtype, outfile=tmp_path / f"{outtype}.gguf")
        write_tuned_gguf(planned, planned.outfile, StandIn(WORSE if outtype == "q4_k_m" else RECORD))
        (opened,) = open_models(None, [planned.outfile])
        named[outtype] = describe(opened).variant
    assert named == {"q4_k_m": "q4_k_m", "q4_k_m_h": "q4_k_m_h tuned"}
    again = plan_conversion(planned.outfile, outtype="q3_k_m", allow_requantize=True)
    assert {key for key in again.metadata if key.startswith("bamba_quant")} == {"bamba_quant.version"}


def test_shards_are_those_of_the_single_file(tmp_path: Path) -> None:
    files = tuned_gguf(tmp_path / "x.gguf", StandIn(), split=1_000_000)
    assert len(files) > 2
    assert names_left(tmp_path) == [file.name for file in files]
    (tmp_path / "single").mkdir()
    (single,) = tuned_gguf(tmp_path / "single" / "x.gguf", StandIn())
    assert_same_tensors(files[1], single)
    assert read_record(open_checkpoint(files[-1])) == RECORD


@pytest.mark.parametrize("split", [None, 1_000_000])
def test_what_is_not_better_is_written_as_without_tuning(split: int | None, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    written = tuned_gguf(tmp_path / "a" / "x.gguf", StandIn(WORSE), split=split)
    plain = plain_gguf(tmp_path / "b" / "x.gguf", split=split)
    assert [file.read_bytes() for file in written] == [file.read_bytes() for file in plain]


def test_a_failed_or_interrupted_tuning_leaves_no_gguf(tmp_path: Path) -> None:
    for error in (CheckpointError("no"), KeyboardInterrupt()):

        def fail(quantized: Path, error: BaseException = error) -> Tuned:
            assert open_checkpoint(quantized).tensors
            raise error

        with pytest.raises(type(error)):
            tuned_gguf(tmp_path / "x.gguf", fail)
        assert names_left(tmp_path) == []


def test_outputs_are_checked_before_anything_is_tuned(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"old")
    tune = StandIn()
    with pytest.raises(OutputError, match="exists already"):
        tuned_gguf(tmp_path / "x.gguf", tune)
    assert not tune.given
    tuned_gguf(tmp_path / "x.gguf", tune, overwrite=True)
    assert tune.given
    assert names_left(tmp_path) == ["x.gguf"]


def tuned_directory(model: Path, place: Path, tune: Any, scheme: str = SCHEMES[0], **options: Any) -> Any:
    plan = plan_quantization(model, scheme)
    return write_tuned_directory(plan, place, tune, begun={"seed": 3}, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tuned_directory_holds_the_tuned_tensors_and_its_record(
    scheme: str, model: Path, tmp_path: Path
) -> None:
    tune = StandIn()
    tuned_directory(model, tmp_path / "tuned", tune, scheme)
    write_plan(plan_quantization(model, scheme), tmp_path / "plain")
    assert names_left(tmp_path) == ["plain", "tuned"]
    assert names_left(tmp_path / "tuned") == names_left(tmp_path / "plain")
    found, before = (directories.tensors(tmp_path / name) for name in ("tuned", "plain"))
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        raw = directories.to_numpy(tensor).tobytes()
        wanted = tune.tensors.get(name, directories.to_numpy(before[name]))
        assert raw == wanted.tobytes(), name
    assert read_record(open_checkpoint(tmp_path / "tuned")) == RECORD
    card, plain = ((tmp_path / name / "README.md").read_text() for name in ("tuned", "plain"))
    assert card == f"{plain}\n{RECORD.account()}\n"
    config, without = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("tuned", "plain")
    )
    assert config == without | {"bamba_quant": RECORD.plain()}


def test_a_directory_that_is_not_better_is_written_as_without_tuning(model: Path, tmp_path: Path) -> None:
    tuned_directory(model, tmp_path / "tuned", StandIn(WORSE))
    write_plan(plan_quantization(model, SCHEMES[0]), tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "tuned" / file.name).read_bytes() == file.read_bytes()


def test_an_interrupted_tuning_of_a_directory_goes_on(model: Path, tmp_path: Path) -> None:
    def interrupt(quantized: Path) -> Tuned:
        raise KeyboardInterrupt

    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tuned_directory(model, target, interrupt)
    assert names_left(tmp_path) == [partial_of(target).name]
    with pytest.raises(OutputError, match="another tuning"):
        write_tuned_directory(
            plan_quantization(model, SCHEMES[0]), target, StandIn(), begun={"seed": 4}, resume=True
        )
    tune = StandIn()
    told = []
    tuned_directory(model, target, tune, resume=True, progress=told.append)
    assert tune.given == [partial_of(target)]
    tuned_directory(model, tmp_path / "undisturbed", StandIn())
    for file in target.iterdir():
        assert (tmp_path / "undisturbed" / file.name).read_bytes() == file.read_bytes()


def test_a_directory_that_was_half_changed_is_begun_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bamba_quant.calibration import tuned_output

    target, tune = tmp_path / "out", StandIn()
    with monkeypatch.context() as patched:
        patched.setattr(tuned_output, "insert_key", lambda *arguments: 1 / 0 if tune.given else None)
        patched.setattr(
            "bamba_quant.writers.resumable._discard", lambda partial, journal: None
        )  # as if it were killed
        with pytest.raises(ZeroDivisionError):
            tuned_directory(model, target, tune)
    again = StandIn()
    tuned_directory(model, target, again, resume=True)
    assert {n: v.tobytes() for n, v in again.tensors.items()} == {
        n: v.tobytes() for n, v in tune.tensors.items()
    }
    assert names_left(tmp_path) == ["out"]


def test_a_record_that_is_not_one_is_refused(model: Path, tmp_path: Path) -> None:
    tuned_directory(model, tmp_path / "x", StandIn())
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    for key, value in (
        ("tokens", -1),
        ("tokens", True),
        ("held_out_kld_after", "0"),
        ("sha256", ["0" * 64]),
        ("sha256", ["x" * 64, "0" * 64]),
        ("texts", 3),
        ("other", 1),
    ):
        wrong = {**config, "bamba_quant": {"tune": {**config["bamba_quant"]["tune"], key: value}}}
        (tmp_path / "x" / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="record of tuning"):
            read_record(open_checkpoint(tmp_path / "x"))
        assert "record of tuning" in inspect_path(tmp_path / "x").remarks[-1]
