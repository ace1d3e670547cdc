"""Measure what two files lost against the original, write the reports, and read the JSON report.

Usage: python examples/evaluate_files.py TEXT [MODEL [DIRECTORY]]
"""

import json
import sys
from pathlib import Path

from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.run import EvaluationOptions
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.report.write import write_reports
from bamba_quant.writers import write_plan

text = Path(sys.argv[1])
model = Path(sys.argv[2]) if len(sys.argv) > 2 else embedded_model()
directory = Path(sys.argv[3] if len(sys.argv) > 3 else ".")

files = []
for outtype in ("q8_0", "q4_k_m"):
    plan = plan_conversion(model, outtype=outtype, outfile=directory)
    files += write_plan(plan, plan.outfile, overwrite=True)

evaluation = evaluate(model, files, text, EvaluationOptions(ctx=256, chunks=8))
reports = write_reports(evaluation, directory / "report", overwrite=True)

# Any JSON reader will do: report.schema.json in the package describes the file.
report = json.loads(reports.json.read_text("utf-8"))
for candidate in report["candidates"]:
    kld, same_top = candidate["figures"]["kld_mean"], candidate["figures"]["same_top"]
    print(
        f"{candidate['model']['recipe']}: mean KLD {kld['value']:.5f} (95 % interval {kld['low']:.5f} to "
        f"{kld['high']:.5f}), same top token {same_top['value']:.1%}"
    )
print(f"open {reports.html} in a browser")
