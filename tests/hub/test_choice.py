"""Which files of a repository are fetched, and which GGUF file a name or a tag means."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf import LlamaFileType

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError
from bamba_quant.hub.choice import choose
from bamba_quant.hub.reference import Reference
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.recipes import recipes

REPOSITORY = "acme/Mill"
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": "gone.safetensors"}}


def chosen(names: Sequence[str], path: str = "", tag: str = "") -> tuple[str, list[str]]:
    found = choose(Reference(REPOSITORY, path=path, tag=tag), names, lambda name: json.dumps(INDEX).encode())
    return found.path, [*found.small, *found.weights]


def test_one_copy_of_the_weights_and_what_belongs_to_the_model() -> None:
    small = (
        "README.md additional_chat_templates/rag.jinja chat_template.jinja config.json generation_config.json "
        "hf_quant_config.json special_tokens_map.json tokenizer.json tokenizer_config.json"
    ).split()
    other = (
        "pytorch_model.bin pytorch_model.bin.index.json consolidated.safetensors figure.png a/config.json "
        ".gitattributes model.safetensors model-00003-of-00003.safetensors onnx/model.onnx"
    ).split()
    index = "model.safetensors.index.json"
    assert chosen([*small, index, *SHARDS, *other]) == ("", [*small, index, *SHARDS])
    assert chosen(["config.json", "model.safetensors", "pytorch_model.bin", "x.gguf"])[1] == [
        "config.json",
        "model.safetensors",
    ]
    assert chosen(["config.json", "pytorch_model.bin", "x.pt"])[1] == ["config.json", "pytorch_model.bin"]
    assert chosen(["config.json", "consolidated.safetensors"])[1] == [
        "config.json",
        "consolidated.safetensors",
    ]
    assert chosen(["config.json", "adapter_config.json"])[1] == ["adapter_config.json", "config.json"]


def test_folders_and_configurations() -> None:
    names = ["README.md", "config.json", "model.safetensors", "a/config.json", "a/model.safetensors"]
    assert chosen(names, "a") == ("a", names[3:])
    assert chosen(names, "config.json") == ("config.json", ["README.md", "config.json"])
    for path in ("b", "model.safetensors", "a/b"):
        with pytest.raises(CheckpointError, match="no such model"):
            chosen(names, path)


LISTING = (
    "mmproj-F16.gguf Mill-Q8_0.gguf Mill-UD-Q4_K_XL.gguf q6/Mill-Q6_K-00001-of-00002.gguf imatrix.gguf "
    "Mill-IQ4_XS-pure.gguf q6/Mill-Q6_K-00002-of-00002.gguf mtp-Mill-Q4_K_M.gguf README.md"
).split()


def llama_cpp(names: Sequence[str], tag: str) -> str | None:
    """The rule of llama.cpp's -hf: TAG and a dot or a hyphen in the path, in either case, of a file that is a model."""
    for name in sorted(names):
        skipped = any(part in name for part in ("mmproj", "imatrix", "mtp-", "eagle3-"))
        later = (match := re.search(r"-(\d{5})-of-", name)) and match[1] != "00001"
        if (
            name.endswith(".gguf")
            and not skipped
            and not later
            and re.search(f"{tag}[.-]", name, re.IGNORECASE)
        ):
            return name
    return None


@pytest.mark.parametrize("tag", ["Q8_0", "q8_0", "Q4_K_XL", "UD-Q4_K_XL", "Q6_K", "IQ4_XS", "Q4_K_M", "Q4_K"])
def test_tags_as_llama_cpp_reads_them(tag: str) -> None:
    expected = llama_cpp(LISTING, tag)
    if expected is None:
        with pytest.raises(CheckpointError, match="no GGUF file of the repository has that tag"):
            chosen(LISTING, tag=tag)
    else:
        path, fetched = chosen(LISTING, tag=tag)
        assert path == expected and fetched[0] == expected and len(fetched) == (2 if tag == "Q6_K" else 1)


def test_gguf_files() -> None:
    assert chosen(["a/x.gguf", "a/x-00001-of-00002.gguf"], "a/x.gguf") == ("a/x.gguf", ["a/x.gguf"])
    assert chosen(LISTING, "q6/Mill-Q6_K-00002-of-00002.gguf")[1] == [n for n in LISTING if "Q6_K" in n]
    assert chosen(["config.json", "x.gguf", "mmproj.gguf"]) == ("x.gguf", ["x.gguf"])
    assert chosen(LISTING, "q6") == (LISTING[3], [n for n in LISTING if "Q6_K" in n])
    with pytest.raises(CheckpointError, match="several models") as failure:
        chosen(LISTING)
    assert f"{REPOSITORY}/Mill-IQ4_XS-pure.gguf" in str(failure.value)
    with pytest.raises(CheckpointError, match="no GGUF files"):
        chosen(["config.json", "model.safetensors"], tag="Q8_0")


# huggingface.js, packages/gguf/src/quant-descriptions.ts and gguf.ts: known types, UD- before, _X behind.
HUB_TYPES = [str(each.name).removeprefix("MOSTLY_").removeprefix("ALL_") for each in LlamaFileType]
HUB_TYPE = re.compile(
    rf"(?P<prefix>UD-)?(?P<type>{'|'.join(sorted(HUB_TYPES, key=len, reverse=True))})(_(?P<more>[A-Z]+))?"
)


def test_default_names_are_found_by_their_types(tmp_path: Path) -> None:
    """The Hub's parser takes the last type of a name; -hf looks for the tag. Both must find a file of each type."""
    for recipe in recipes():
        if recipe.candidates or recipe.needs_importance:
            continue  # planned for a size of their own, or with a file
        name = plan_conversion(embedded_model(), outtype=recipe, outfile=tmp_path).outfile.name
        kind = recipe.name.upper()
        assert name.endswith(f"-{kind}.gguf") and llama_cpp([name], kind) == name
        matches = list(HUB_TYPE.finditer(name))
        if kind in HUB_TYPES:
            assert matches and matches[-1]["type"] == kind, name
