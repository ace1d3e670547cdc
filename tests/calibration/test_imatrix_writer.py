"""Files of importance matrices are llama-imatrix's: llama.cpp quantizes by them, and earlier ones add up."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from bamba_quant.calibration.imatrix import calibrated, measure_imatrix
from bamba_quant.calibration.imatrix_writer import check_imatrix_target, write_imatrix
from bamba_quant.checkpoint.activation_sums import ActivationSums, TensorSums, checked_sums, merge_sums
from bamba_quant.checkpoint.imatrix import imatrix_from_sums, read_imatrix, read_sums
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError, OutputError, PlanError
from bamba_quant.recipes import recipe_named
from tests.support import llama
from tests.support.conversion import assert_same_tensors, to_gguf
from tests.support.families import FAMILIES, STACKED, save

TEXT = "The miller looked at the river, and the river went on turning his wheel. " * 60
FAMILY = FAMILIES[STACKED[0][0]]
# Eight of them, with rows of whole blocks of 256.
EXPERTS = next(iter(FAMILY.small.llama_quantize.values()))


def text_file(place: Path) -> Path:
    file = place / "text.txt"
    file.write_text(TEXT)
    return file


def sums_of(*counts: int, columns: int = 4, name: str = "blk.0.x.weight", seed: int = 0) -> ActivationSums:
    rng = np.random.default_rng(seed)
    squares = rng.chisquare(1, (len(counts), columns)) * np.array(counts)[:, None]
    entry = TensorSums(squares, np.array(counts, np.int64), rng.standard_normal((len(counts), columns)))
    return ActivationSums({name: entry}, ("a.txt",), -(-max(counts) // 32), 32)


def as_llama_quantize_reads_it(file: Path) -> dict[str, np.ndarray]:
    """tools/quantize/quantize.cpp, ``load_imatrix``, over gguf-py's reader."""
    reader = gguf.GGUFReader(file)
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        assert key in reader.fields, key
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    found = {}
    for name, sums in tensors.items():
        if not name.endswith(".in_sum2"):
            continue
        counts = tensors[name.replace(".in_sum2", ".counts")].astype(np.float32)
        assert sums.dtype == np.float32 and counts.shape == (len(sums), 1)
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)
        found[name.removesuffix(".in_sum2")] = means.reshape(-1)
    return found


@pytest.mark.parametrize("recipe", ["q4_k_m", "iq4_xs"])
def test_llama_cpp_quantizes_by_it_to_our_bytes(recipe: str, tmp_path: Path) -> None:
    """With experts of which some have no data; measured at once or read from the file, the tensors are the same."""
    model = save(FAMILY.random(**EXPERTS), tmp_path / "m", dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((embedded_model() / name).read_bytes())
    chunks = np.full((1, 32), 7)
    sums = collected(model, chunks)
    assert sums.experts_without_data
    write_imatrix(sums, tmp_path / "imatrix.gguf")
    importance = as_llama_quantize_reads_it(tmp_path / "imatrix.gguf")
    bf16 = to_gguf(model, tmp_path / "bf16.gguf", "bf16", vocab=False)
    llama.quantize(bf16, tmp_path / "theirs.gguf", recipe_named(recipe).file_type, imatrix=importance)
    for number, imatrix in enumerate((tmp_path / "imatrix.gguf", imatrix_from_sums(sums))):
        ours = to_gguf(model, tmp_path / f"{number}.gguf", recipe, vocab=False, imatrix=imatrix)
        assert_same_tensors(ours, tmp_path / "theirs.gguf")


def collected(model: Path, chunks: np.ndarray) -> ActivationSums:
    from bamba_quant.calibration.imatrix import collect
    from bamba_quant.inference.loading import load_model

    return collect(load_model(model), chunks, ("text",))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    sums = sums_of(32, 0, 7)
    write_imatrix(sums, tmp_path / "x.gguf")
    found = read_sums(tmp_path / "x.gguf")
    entry, expected = found.entries["blk.0.x.weight"], sums.entries["blk.0.x.weight"]
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt",), 1, 32)
    np.testing.assert_array_equal(entry.counts, expected.counts)
    np.testing.assert_array_equal(entry.squares, expected.squares.astype(np.float32))
    assert entry.sums is not None and expected.sums is not None
    np.testing.assert_array_equal(entry.sums, expected.sums.astype(np.float32))


def test_the_older_form_holds_the_same_means(tmp_path: Path) -> None:
    sums = sums_of(64, 0, 7)
    write_imatrix(sums, tmp_path / "x.dat")
    found = read_imatrix(tmp_path / "x.dat")
    assert (found.dataset, found.chunks) == ("a.txt", 2)
    np.testing.assert_allclose(
        found.entries["blk.0.x.weight"], imatrix_from_sums(sums).entries["blk.0.x.weight"], rtol=1e-6
    )
    without = ActivationSums(
        {**sums.entries, "y": TensorSums(np.zeros((1, 4)), np.zeros(1, np.int64))}, (), 2, 32
    )
    write_imatrix(without, tmp_path / "y.dat")
    assert read_imatrix(tmp_path / "y.dat").entries.keys() == sums.entries.keys()


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_an_earlier_file_adds_up(form: str, tmp_path: Path) -> None:
    """As llama-imatrix --in-file: in the older form a chunk is as many tokens as this run's."""
    earlier, later = sums_of(64, 64), sums_of(32, 96, seed=1)
    write_imatrix(earlier, tmp_path / f"x.{form}")
    shapes = {"blk.0.x.weight": (2, 4), "other": (1, 8)}
    read = checked_sums(read_sums(tmp_path / f"x.{form}"), shapes, 32, tmp_path / f"x.{form}")
    found = merge_sums([read, later], 32)
    entry = found.entries["blk.0.x.weight"]
    np.testing.assert_array_equal(entry.counts, [96, 160])
    both = earlier.entries["blk.0.x.weight"].squares + later.entries["blk.0.x.weight"].squares
    np.testing.assert_allclose(entry.squares, both, rtol=1e-6)
    assert (entry.sums is None) == (form == "dat")
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt",), 5, 32)
    for others in ({"blk.0.x.weight": (2, 5)}, {"other": (1, 8)}, {"blk.0.x.weight": (8, 1)}):
        if form == "dat" and others == {"blk.0.x.weight": (8, 1)}:
            continue  # which does not tell how many matrices there are
        with pytest.raises(PlanError, match="another model"):
            checked_sums(read_sums(tmp_path / f"x.{form}"), others, 32, tmp_path / "x")


def test_texts_measured_one_after_the_other_are_both_texts(tmp_path: Path) -> None:
    first, second = text_file(tmp_path), tmp_path / "second.txt"
    second.write_text(TEXT[::-1])
    both = measure_imatrix(embedded_model(), [first, second], ctx=64)
    write_imatrix(measure_imatrix(embedded_model(), [first], ctx=64).sums, tmp_path / "one.gguf")
    again = measure_imatrix(embedded_model(), [second], ctx=64, merge=[tmp_path / "one.gguf"])
    assert again.sums.datasets == both.sums.datasets == (str(first), str(second))
    assert not again.notes
    for name, entry in both.sums.entries.items():
        found = again.sums.entries[name]
        # What is left of the first text begins the second's chunks where both are measured at once.
        assert abs(int(found.counts[0]) - int(entry.counts[0])) <= 64
        np.testing.assert_allclose(found.mean_squares(), entry.mean_squares(), rtol=0.2)
    merged_alone = measure_imatrix(embedded_model(), [], merge=[tmp_path / "one.gguf"])
    assert merged_alone.tokens == 0
    with pytest.raises(CheckpointError, match="nothing to measure"):
        measure_imatrix(embedded_model(), [])


def test_notes_name_what_is_missing(tmp_path: Path) -> None:
    model = save(FAMILY.random(**EXPERTS, tie_word_embeddings=True), tmp_path / "m")
    write_imatrix(collected(model, np.full((1, 32), 7)), tmp_path / "x.dat")
    write_imatrix(collected(model, np.full((1, 32), 7)), tmp_path / "x.gguf")
    options = {"ctx": 32, "output": True, "tokenizer": embedded_model()}
    notes = measure_imatrix(model, [], merge=[tmp_path / "x.gguf"], **options).notes
    assert "tied to the embedding" in notes[0]
    assert "blk.0.ffn_down_exps.weight: no token reached" in notes[1]
    assert "of 8 experts" in notes[1]
    notes = measure_imatrix(model, [], merge=[tmp_path / "x.dat"], **options).notes
    assert "have no means" in notes[-1]


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    write_imatrix(sums_of(32), file)
    before = file.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write_imatrix(sums_of(64), file)
    with pytest.raises(OutputError, match="exists already"):
        check_imatrix_target(file, overwrite=False, inputs=())
    with pytest.raises(OutputError, match="does not exist"):
        check_imatrix_target(tmp_path / "no" / "x.gguf", overwrite=False, inputs=())
    assert file.read_bytes() == before
    write_imatrix(sums_of(64), file, overwrite=True)
    assert file.read_bytes() != before


def test_calibrating_is_measuring_and_reading(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    imatrix, notes = calibrated(embedded_model(), [text], chunks=1)
    assert not notes
    write_imatrix(measure_imatrix(embedded_model(), [text], chunks=1).sums, tmp_path / "x.gguf")
    read = read_imatrix(tmp_path / "x.gguf")
    assert imatrix.entries.keys() == read.entries.keys()
    for name, values in read.entries.items():
        np.testing.assert_array_equal(imatrix.entries[name], values)
    without_file = {k: v for k, v in read.metadata().items() if k != "quantize.imatrix.file"}
    assert imatrix.metadata() == without_file
