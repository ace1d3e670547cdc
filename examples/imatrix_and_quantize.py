"""Measure an importance matrix over a text and quantize with it, to GGUF and to int4.

Usage: python examples/imatrix_and_quantize.py TEXT [MODEL [DIRECTORY]]
"""

import sys
from pathlib import Path

from bamba_quant.calibration.imatrix import measure_imatrix
from bamba_quant.calibration.imatrix_writer import write_imatrix
from bamba_quant.checkpoint.imatrix import read_imatrix
from bamba_quant.embedded import embedded_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan

text = Path(sys.argv[1])
model = Path(sys.argv[2]) if len(sys.argv) > 2 else embedded_model()
directory = Path(sys.argv[3] if len(sys.argv) > 3 else ".")

# Eight chunks of 256 tokens are enough to try it. For a model that you want to use, take a long text and all of it.
measured = measure_imatrix(model, [text], ctx=256, chunks=8)
file = directory / "imatrix.gguf"
write_imatrix(measured.sums, file, overwrite=True)
imatrix = read_imatrix(file)
print(f"{file}: {len(measured.sums.entries)} matrices over {measured.tokens:,} tokens")

plan = plan_conversion(model, outtype="q4_k_m", outfile=directory, imatrix=imatrix)
(file,) = write_plan(plan, plan.outfile, overwrite=True)
print(f"{file}: {file.stat().st_size:,} bytes")

quantization = plan_quantization(model, "w4a16-g128", imatrix=imatrix)
written = write_plan(quantization, directory / "w4a16", overwrite=True)
print(f"{directory / 'w4a16'}: {sum(each.stat().st_size for each in written):,} bytes")
