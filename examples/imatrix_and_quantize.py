"""Measure an importance matrix over a text and quantize with it, to GGUF and to int4.

Usage: python examples/imatrix_and_quantize.py TEXT [MODEL [DIRECTORY]]
"""

import sys
from pathlib import Path

import bamba_quant
from bamba_quant.embedded import embedded_model

text = Path(sys.argv[1])
model = Path(sys.argv[2]) if len(sys.argv) > 2 else embedded_model()
directory = Path(sys.argv[3] if len(sys.argv) > 3 else ".")
matrix = directory / "imatrix.gguf"

# Eight chunks of 256 tokens are enough to try it. For a model that you want to use, take a long text and all of it.
measured = bamba_quant.imatrix(model, [text], matrix, ctx=256, chunks=8, overwrite=True)
print(f"{matrix}: {len(measured.sums.entries)} matrices over {measured.tokens:,} tokens")

files = bamba_quant.convert(model, "q4_k_m", directory, imatrix=matrix, overwrite=True)
files += bamba_quant.quantize(model, directory / "w4a16", "w4a16-g128", imatrix=matrix, overwrite=True)
for file in files:
    print(f"{file}: {file.stat().st_size:,} bytes")
