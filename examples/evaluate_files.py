"""Measure what two files lost against the original, write the reports, and read the JSON report.

Usage: python examples/evaluate_files.py TEXT [MODEL [DIRECTORY]]
"""

import json
import sys
from pathlib import Path

import bamba_quant
from bamba_quant.embedded import embedded_model

text = Path(sys.argv[1])
model = Path(sys.argv[2]) if len(sys.argv) > 2 else embedded_model()
directory = Path(sys.argv[3] if len(sys.argv) > 3 else ".")
reports = directory / "report"

files: list[Path] = []
for outtype in ("q8_0", "q4_k_m"):
    files += bamba_quant.convert(model, outtype, directory, overwrite=True)
bamba_quant.evaluate(model, files, text, report_dir=reports, ctx=256, chunks=8, overwrite=True)

# Any JSON reader will do: report.schema.json in the package describes the file.
report = json.loads((reports / "report.json").read_text("utf-8"))
for candidate in report["candidates"]:
    kld, same_top = candidate["figures"]["kld_mean"], candidate["figures"]["same_top"]
    print(
        f"{candidate['model']['recipe']}: mean KLD {kld['value']:.5f} (95 % interval {kld['low']:.5f} to "
        f"{kld['high']:.5f}), same top token {same_top['value']:.1%}"
    )
print(f"open {reports / 'report.html'} in a browser")
