"""How the Hub, llama.cpp, Ollama and LM Studio find a file of a repository by a type, restated from their sources.

llama.cpp: common/download.cpp (``gguf_filename_is_model``, ``get_gguf_split_info``, ``find_best_model``). The Hub:
huggingface.js, packages/tasks/src/gguf.ts (``parseGGUFQuantLabel``), by which links of Ollama and LM Studio to the Hub
name a file, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# GGMLFileQuantizationType, in its order: where two begin alike, the first one of the expression matches.
HUB_TYPES = (
    "F32 F16 Q4_0 Q4_1 Q4_1_SOME_F16 Q4_2 Q4_3 Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M "
    "Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 Q4_0_4_4 "
    "Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0 Q2_0 Q2_K_XL Q3_K_XL Q4_K_XL Q5_K_XL Q6_K_XL Q8_K_XL"
).split()


def hub_label(file: str) -> str | None:
    """The type that the Hub shows for a file: the last one in its name."""
    found = [match[0] for match in re.finditer(rf"(UD-)?({'|'.join(HUB_TYPES)})(_[A-Z]+)?", file.upper())]
    return found[-1] if found else None


def llama_file(files: Sequence[str], tag: str = "") -> str | None:
    """The file that ``-hf repository:tag`` loads, first of its parts if it is split."""

    def is_model(path: str) -> bool:
        name = path.rpartition("/")[2]
        others = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
        return name.endswith(".gguf") and not any(word in name for word in others)

    def is_later_part(path: str) -> bool:
        split = re.fullmatch(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", path)
        return split is not None and int(split[3]) > 1 and int(split[2]) != 1

    models = [path for path in files if is_model(path) and not is_later_part(path)]
    for kind in [tag] if tag else ["Q4_K_M", "Q8_0"]:
        for path in models:
            if re.search(kind + "[.-]", path, re.IGNORECASE):
                return path
    return models[0] if models and not tag else None
