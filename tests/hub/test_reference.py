"""Names of models on the Hub: every form that users write, against huggingface_hub's own parser."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import parse_hf_uri

from bamba_quant.hub import local_path
from bamba_quant.hub.reference import Reference, parse_reference

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    "name",
    [
        "acme/Mill-1B",
        "acme/Mill-1B@v1.0",
        "acme/Mill-1B@" + COMMIT,
        "acme/Mill-1B@refs/pr/3",
        "acme/Mill-1B@refs/pr/3/sub/x.gguf",
        "acme/Mill-1B@a%2Fb/sub/x.gguf",
        "acme/Mill-1B/x-Q4_K_M.gguf",
        "a.b_c/d.e",
    ],
)
def test_as_huggingface_hub_reads_it(name: str) -> None:
    expected = parse_hf_uri(f"hf://{name}")
    for text in (name, f"hf://{name}", f"hf://models/{name}", str(Path(f"hf://{name}")), f"{name}/"):
        found = parse_reference(text)
        assert found is not None, text
        assert (found.repository, found.revision, found.path, found.tag) == (
            expected.id,
            expected.revision,
            expected.path_in_repo,
            "",
        ), text


def test_llama_cpps_tags() -> None:
    assert parse_reference("acme/Mill:Q4_K_M") == Reference("acme/Mill", tag="Q4_K_M")
    assert parse_reference("hf://acme/Mill@v1/gguf:UD-Q2_K_XL") == Reference(
        "acme/Mill", "v1", "gguf", "UD-Q2_K_XL"
    )


@pytest.mark.parametrize(
    "path",
    ["Mill", "./acme/Mill", "/acme/Mill", "~/acme/Mill", "acme/../Mill", "acme/Mill/../x", "acme//Mill", "a b/c",
     "acme/x.gguf", "acme/x.json", "", "-/x", "acme/Mill\0", "acme/Mill:a/b", "https://huggingface.co/acme/Mill"],
)  # fmt: skip
def test_what_is_only_a_path(path: str) -> None:
    assert parse_reference(path) is None
    assert local_path(path) == Path(path)  # whoever opens it says that it is not there


def test_a_path_that_exists_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "Mill").symlink_to("nowhere")  # also one that cannot be opened
    assert local_path("acme/Mill") == Path("acme/Mill")
