"""Convert a checkpoint to a Q4_K_M GGUF file and check it against the original, tensor by tensor.

Usage: python examples/convert_and_check.py [MODEL [DIRECTORY]]
"""

import sys
from pathlib import Path

from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation.weights_compare import compare_weights
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.writers import write_plan

model = Path(sys.argv[1]) if len(sys.argv) > 1 else embedded_model()
directory = Path(sys.argv[2] if len(sys.argv) > 2 else ".")

# The plan has every tensor's name, type and size. Only headers and small files have been read so far.
plan = plan_conversion(model, outtype="q4_k_m", outfile=directory)
print(f"{len(plan.rows)} tensors, {plan.elements:,} weights, {plan.bits_per_weight:.2f} bits per weight")

(file,) = write_plan(plan, plan.outfile, overwrite=True)
print(f"wrote {file}, {file.stat().st_size:,} bytes")

comparison = compare_weights(model, file)
print(f"signal to noise of all weights: {comparison.sqnr:.1f} dB")
worst = max(comparison.tensors, key=lambda loss: loss.max_error)
print(f"largest error of a weight: {worst.max_error:.3g} in {worst.name}")
