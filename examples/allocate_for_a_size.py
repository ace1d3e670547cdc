"""Choose the format of each tensor so that the file has a given size and diverges least, and write the recipe.

Usage: python examples/allocate_for_a_size.py TEXT BYTES [MODEL [DIRECTORY]]
"""

import sys
from pathlib import Path

from bamba_quant.calibration.allocation import allocate
from bamba_quant.calibration.costs import Measuring, text_costs
from bamba_quant.embedded import embedded_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.recipes import recipe_text
from bamba_quant.writers import write_plan

text, size = Path(sys.argv[1]), int(sys.argv[2])
model = Path(sys.argv[3]) if len(sys.argv) > 3 else embedded_model()
directory = Path(sys.argv[4] if len(sys.argv) > 4 else ".")

# What each tensor costs in each format, in nats a token. More chunks measure more precisely.
formats = ("q4_k", "q5_k", "q6_k")
costs = text_costs(model, [text], Measuring(ctx=256, chunks=4), formats=formats)

allocation = allocate(model, costs, target_bytes=size, name="example")
(directory / "example.toml").write_text(recipe_text(allocation.recipe, allocation.like.name, "An example."))
print(f"predicted divergence: {allocation.allocated.predicted:.4f} nats a token")
for move in allocation.moves[:5]:
    print(f"  {move.tensor}: {move.before} -> {move.after}")

plan = plan_conversion(model, outtype=allocation.recipe, outfile=directory)
(file,) = write_plan(plan, plan.outfile, overwrite=True)
print(f"{file}: {file.stat().st_size:,} of {size:,} bytes")
assert file.stat().st_size <= size
