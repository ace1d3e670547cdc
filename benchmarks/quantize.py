"""``convert --outtype X`` as a whole process against llama.cpp's quantizer on a 16-bit file, byte for byte.

    python benchmarks/quantize.py [--model DIR] [--types q4_k_m …] [--imatrix] [--runs N]

For each type: our wall time and peak memory from the safetensors to the finished file, llama.cpp's from the bf16 GGUF
that must be written first (through llama-cpp-python, as many threads), their ratio, and whether every tensor's bytes
are the same. Without --model, random weights in Bamba-9B's layer shapes: 1.83 billion. With --imatrix both weigh the
columns by the same random importance matrix.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from checkpoints import make_checkpoint
from processes import run

sys.path.insert(0, str(Path(__file__).parent.parent))

THEIRS = """
import sys
from pathlib import Path
from bamba_quant.checkpoint.imatrix import read_imatrix
from tests.support import llama
source, target, file_type, imatrix = sys.argv[1:]
importance = {k: v.copy() for k, v in read_imatrix(Path(imatrix)).entries.items()} if imatrix else None
llama.quantize(Path(source), Path(target), int(file_type), imatrix=importance)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="where the files go")
    parser.add_argument("--model", type=Path, help="a checkpoint directory")
    parser.add_argument("--types", nargs="+", help="by default every quantized type")
    parser.add_argument("--imatrix", action="store_true", help="with a random importance matrix")
    parser.add_argument("--runs", type=int, default=1, help="rounds, of which the median counts")
    options = parser.parse_args()
    from bamba_quant.recipes import recipe_named, recipes
    from tests.recipes.test_llama_quantize import random_imatrix
    from tests.support.conversion import assert_same_tensors

    options.directory.mkdir(exist_ok=True)
    model = options.model or make_checkpoint(options.directory / "bamba-9b-shapes-3", 3, (1,))
    bf16, theirs, ours = (options.directory / f"{name}.gguf" for name in ("bf16", "theirs", "ours"))
    convert = [sys.executable, "-m", "bamba_quant_cli", "convert", str(model), "--overwrite", "--outfile"]
    wall, peak = run([*convert, str(bf16), "--outtype", "bf16"])
    print(f"{model}: the bf16 GGUF took {wall:.1f} s, {peak:.0f} MB", flush=True)
    imatrix = options.directory / "imatrix.gguf" if options.imatrix else None
    if imatrix:
        random_imatrix(model, imatrix)
    names = options.types or [
        known.name for known in recipes() if known.name not in ("f32", "f16", "bf16") and not known.candidates
    ]
    print(
        f"{'type':8} {'ours':>8} {'peak':>9} {'llama.cpp':>10} {'peak':>9} {'faster':>7}  bytes", flush=True
    )
    for name in names:
        recipe = recipe_named(name)
        if recipe.needs_importance and not imatrix:
            continue
        mine, other = [], []
        for _ in range(options.runs):
            weighted = ["--imatrix", str(imatrix)] if imatrix else []
            mine.append(run([*convert, str(ours), "--outtype", name, *weighted]))
            theirs.unlink(missing_ok=True)
            command = [sys.executable, "-c", THEIRS, str(bf16), str(theirs), str(int(recipe.file_type))]
            other.append(run([*command, str(imatrix or "")]))
        assert_same_tensors(ours, theirs)
        a, b = (statistics.median(wall for wall, _ in times) for times in (mine, other))
        p, q = (max(peak for _, peak in times) for times in (mine, other))
        print(f"{name:8} {a:6.1f} s {p:6.0f} MB {b:8.1f} s {q:6.0f} MB {b / a:6.1f} ×  the same", flush=True)


if __name__ == "__main__":
    main()
