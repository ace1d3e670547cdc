"""Every type of a release is found by its name, by the rules of those who load it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bamba_quant.checkpoint.gguf_file import split_name
from bamba_quant.codecs import SafetensorsCodec, codecs
from bamba_quant.recipes import recipes
from bamba_quant.releases.names import check_names, gguf_name, imatrix_name, repositories, type_of
from bamba_quant.releases.preset import ReleaseError, preset_names, read_preset
from tests.release.resolving import hub_label, llama_file

PLAIN = [each.name for each in recipes() if type_of(gguf_name("m", each.name)) == each.name.upper()]


@pytest.mark.parametrize(
    "name", ["Bamba-9B-v2", "Falcon-H1-0.5B-Base", "granite-4.0-h-tiny", "bf16-f16-model"]
)
def test_every_type_is_found_among_all_of_them(name: str) -> None:
    # Of f16 and bf16 the first is the end of the second, and a release has one of them.
    for without in ("f16", "bf16"):
        kinds = [each for each in PLAIN if each != without and each not in name]
        files = [gguf_name(name, each) for each in kinds]
        check_names(name, files, ())
        found = sorted([*files, imatrix_name(name), "README.md", "SHA256SUMS", "size-divergence.svg"])
        for kind, file in zip(kinds, files, strict=True):
            for tag in (kind, kind.upper()):
                assert llama_file(found, tag) == file
            assert hub_label(file) == kind.upper()
            parts = [split_name(Path(file.removesuffix(".gguf")), number, 3).name for number in range(3)]
            assert llama_file(sorted(parts), kind) == parts[0]
            assert {hub_label(part) for part in parts} == {kind.upper()}
        assert llama_file(found) == gguf_name(name, "q4_k_m")


def test_a_recipe_like_a_type_keeps_the_type_at_the_end() -> None:
    assert gguf_name("Bamba-9B", "q4_k_m_h") == "Bamba-9B-h-Q4_K_M.gguf"
    for recipe in recipes():
        file = gguf_name("Bamba-9B", recipe.name)
        assert llama_file([file], type_of(file)) == file and hub_label(file) == type_of(file)


@pytest.mark.parametrize(
    ("name", "types", "said"),
    [
        ("m", ["q4_k_m", "q4_k_m_h"], "several files of the release answer to :Q4_K_M"),
        ("m", ["f16", "bf16"], "several files of the release answer to :F16"),
        ("m-Q8_0", ["q8_0", "q4_k_m"], "several files of the release answer to :Q8_0"),
        ("tiny-mtp", ["q8_0"], "takes no file with this name for a model"),
        ("an imatrix", ["q8_0"], "cannot be a repository's"),
        ("a--b", ["q8_0"], "cannot be a repository's"),
        ("../m", ["q8_0"], "cannot be a repository's"),
        ("m" * 81, ["q8_0"], "cannot be a repository's"),
    ],
)
def test_names_that_would_not_be_found_are_errors(name: str, types: list[str], said: str) -> None:
    with pytest.raises(ReleaseError, match=said):
        check_names(name, [gguf_name(name, each) for each in types], ())


def test_every_preset_and_every_scheme_has_its_own_repositories() -> None:
    for each in preset_names():
        preset = read_preset(each)
        files = [gguf_name("Bamba-9B", name) for name in preset.types]
        check_names("Bamba-9B", files, preset.schemes)
    schemes = [codec.name for codec in codecs(SafetensorsCodec) if codec.writable]
    made = repositories("Bamba-9B", schemes, ["q8_0"])
    assert len(set(made.values())) == len(schemes) + 1
    assert made["fp8-dynamic"] == "Bamba-9B-FP8" and made["w4a16-g128"] == "Bamba-9B-W4A16"
