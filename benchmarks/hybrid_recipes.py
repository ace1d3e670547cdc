"""What recipes lose beside plain ones at the same bytes, and the costs by role that the hybrid recipes rest on.

    python benchmarks/hybrid_recipes.py MODEL TEXT [RECIPE[:PLAIN] …] [--device cuda] [--chunks 40] [--imatrix FILE]
    python benchmarks/hybrid_recipes.py MODEL TEXT --roles [--device cuda]

A RECIPE is a built-in name or a .toml file; what it is compared with is the type it is named after or like, or PLAIN.
Without any, every built-in hybrid recipe is measured. Mean KL divergence from MODEL on TEXT, activations exact.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--imatrix", type=Path, help="for the plain types and the recipes alike")
    parser.add_argument("--roles", action="store_true")
    options = parser.parse_args()
    if options.roles:
        _roles(options)
    else:
        _losses(options)


def _losses(options: argparse.Namespace) -> None:
    from bamba_quant.evaluation.evaluate import evaluate
    from bamba_quant.evaluation.run import EvaluationOptions
    from bamba_quant.planning.convert import plan_conversion
    from bamba_quant.recipes import read_recipe, recipe_named, recipes
    from bamba_quant.writers import write_plan

    asked = options.recipes or [each.name for each in recipes() if each.candidates]
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        files: dict[str, Path] = {}

        def made(name: str) -> Path:
            if name not in files:
                recipe = read_recipe(Path(name)) if name.endswith(".toml") else recipe_named(name)
                place = Path(scratch) / f"{Path(name).stem}.gguf"
                conversion = plan_conversion(
                    options.model, outtype=recipe, outfile=place, imatrix=options.imatrix
                )
                (files[name],) = write_plan(conversion, conversion.outfile)
            return files[name]

        for each in asked:
            name, _, plain = each.partition(":")
            plain = plain or Path(name).stem.removesuffix("_h").removesuffix("_a")
            pairs.append((name, plain, made(name), made(plain)))
        found = evaluate(
            options.model,
            list(files.values()),
            options.text,
            EvaluationOptions(
                chunks=options.chunks,
                device=options.device,
                activations="none",
                noise_floor="none",
                drift_chunks=0,
            ),
        )
        sizes = {each: file.stat().st_size for each, file in files.items()}
    lost = {name: each.figures["kld_mean"].value for name, each in zip(files, found.candidates, strict=True)}
    print("| recipe | bytes | mean KLD | plain | bytes | mean KLD | ratio |\n|---|---|---|---|---|---|---|")
    for name, plain, _, _ in pairs:
        print(
            f"| {Path(name).stem} | {sizes[name]:,} | {lost[name]:.5f} | {plain} | {sizes[plain]:,} | "
            f"{lost[plain]:.5f} | {lost[name] / lost[plain]:.3f} |"
        )


def _roles(options: argparse.Namespace) -> None:
    """A line a role: what its layers together cost in q4_k, and what other formats cost beside q4_k."""
    from bamba_quant.calibration.candidates import FORMATS
    from bamba_quant.calibration.costs import Measuring, text_costs
    from bamba_quant.planning.model import open_model

    costs = text_costs(options.model, [options.text], Measuring(chunks=options.chunks, device=options.device))
    source = open_model(options.model)
    layers = source.config.num_hidden_layers
    by_role = defaultdict(list)
    for _, rule in source.pairs:
        if rule.gguf in costs:
            by_role[rule.role].append((rule.layer, costs[rule.gguf]))
    print("| role | all layers in q4_k, nats | " + " | ".join(FORMATS) + " | by layer, 1e-3 |")
    print("|---" * (len(FORMATS) + 3) + "|")
    for role, found in by_role.items():
        unit = sum(each["q4_k"] for _, each in found) / len(found)
        whole = unit * (1 if found[0][0] is None else layers)
        ratios = [sum(each[name] for _, each in found) / len(found) / unit for name in FORMATS]
        listed = " ".join(f"{1e3 * each['q4_k']:.2f}" for _, each in found)
        print(
            f"| {role} | {whole:.4f} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + f" | {listed} |"
        )


if __name__ == "__main__":
    main()
