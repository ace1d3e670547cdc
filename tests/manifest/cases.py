"""The command lines of the manifest.

``@name`` is an input, which ``runner.py`` makes when it is first needed. ``OUT`` is the directory of a case's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Case:
    """One command line.

    ``stdout`` and ``files`` say what is recorded of the JSON that is printed and of the files in ``OUT``: nothing
    (``""``), a ``hash`` of each, or ``figures``: numbers that depend on the processor, compared with a tolerance.
    """

    name: str
    command: str
    stdout: str = ""
    files: str = "hash"


# What `bamba-quant recipes` lists.
RECIPES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs",
    "q4_1", "q4_0", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_s", "tq2_0", "tq1_0", "mxfp4_moe",
    "q2_k_h", "q3_k_s_h", "q3_k_m_h", "q3_k_l_h", "q4_k_s_h", "q4_k_m_h", "q5_k_s_h", "q5_k_m_h", "q6_k_h", "iq4_xs_h",
)  # fmt: skip
PLAIN = ("f32", "f16", "bf16")
NEEDS_IMATRIX = ("q2_k_s",)
# One recipe of each block format, and a hybrid one.
ONE_EACH = (
    "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "iq4_nl", "iq4_xs", "q4_1", "q4_0", "q3_k_m", "q2_k", "tq2_0",
    "tq1_0", "mxfp4_moe", "q4_k_m_h",
)  # fmt: skip
FAMILIES = (
    "bamba", "bamba-biases", "bamba-tied", "bamba-wide", "granite", "granite-experts", "granite-experts-wide",
    "granite-attention", "granite-attention-experts", "mamba2", "mamba2-wide", "mamba", "mamba-wide", "falcon-mamba",
    "state-spaces",
)  # fmt: skip
FP8 = ("--scheme dynamic", "--scheme tensor", "--scheme block", "--format fp8")
INT4 = (
    *(f"--bits {bits} --{kind}" for bits, kind in product((4, 8), ("symmetric", "asymmetric"))),
    "--format torchao",
    "--format torchao-tile-packed",
)
# Cases that a test runs in seconds: each command, each block format and each scheme once.
QUICK = (
    *(f"convert/mini/{recipe}" for recipe in ONE_EACH),
    "convert/mini/f32",
    "convert/mini/imatrix/q4_k_m",
    "convert/recipe-file",
    "convert/requantize",
    *(f"convert/{family}/bf16" for family in ("granite-experts", "mamba2", "mamba", "falcon-mamba")),
    *(f"fp8/bamba-wide/{options.split()[-1]}/search" for options in FP8),
    "int4/bamba-wide/bits4-symmetric-g128/hqq",
    "int4/bamba-wide/torchao-g128/hqq",
    "int4/bamba-wide/torchao-tile-packed-g128/mse",
    "repair/q4_k_m",
    "export/q4_k_m",
    "inspect/gguf",
)


def cases() -> tuple[Case, ...]:
    """Every case, by the commands in turn."""
    found = (*_conversions(), *_quantizations(), *_others(), *_figures())
    assert len({case.name for case in found}) == len(found)
    return found


def _convert(name: str, model: str, options: str, **more: str) -> Case:
    return Case(f"convert/{name}", f"convert {model} {options} --outfile OUT/x.gguf", **more)


def _conversions() -> Iterator[Case]:
    for recipe in RECIPES:
        if recipe not in NEEDS_IMATRIX:
            yield _convert(f"mini/{recipe}", "@mini", f"--outtype {recipe}")
        if recipe not in PLAIN:
            yield _convert(f"mini/imatrix/{recipe}", "@mini", f"--outtype {recipe} --imatrix @imatrix.dat")
            yield Case(
                f"plan/mini/{recipe}",
                f"convert @mini --outtype {recipe} --imatrix @imatrix.dat --dry-run --json",
                "hash",
            )
    for recipe in ("q4_k_m", "q3_k_l", "iq4_xs", "q8_0", "mxfp4_moe"):
        yield _convert(f"pure/{recipe}", "@mini", f"--outtype {recipe} --pure")
    more = {
        "auto": "",
        "tensor-types": "--outtype q4_k_m --tensor-type ssm_out=q6_k --tensor-type blk.[01].ffn=iq4_xs",
        "output-type": "--outtype q4_k_m --output-tensor-type q5_k --token-embedding-type q8_0",
        "leave-output": "--outtype q4_k_m --leave-output-tensor",
        "imatrix-gguf": "--outtype q4_k_m --imatrix @imatrix.gguf",
        "vocab-only": "--vocab-only",
        "no-vocab": "--outtype q8_0 --no-vocab",
        "pre": "--outtype q8_0 --pre gpt-2",
        "named": "--outtype q8_0 --model-name 'Another name'",
        "metadata": "--outtype q8_0 --metadata @metadata.json",
        "split": "--outtype q4_k_m --split-max-size 500K",
        "recipe-file": "--recipe @recipe.toml",
        "recipe-allocated": "--recipe @allocated.toml",
        "recipe-name": "--recipe q4_k_m_h",
    }
    for name, options in more.items():
        yield _convert(name, "@mini", options)
    yield _convert("requantize", "@bf16.gguf", "--outtype q4_k_m")
    yield _convert("requantize-quantized", "@q8_0.gguf", "--outtype q5_k_m --allow-requantize")
    yield _convert("requantize-same", "@q4_k_m.gguf", "--outtype q4_k_m --allow-requantize")
    yield _convert("requantize-recipe", "@f32.gguf", "--recipe @recipe.toml")
    yield _convert("keep-split", "@split.gguf", "--outtype q6_k --keep-split")
    yield _convert("join-split", "@split.gguf", "--outtype bf16")
    yield _convert("from-f32-to-f16", "@f32.gguf", "--outtype f16")
    yield _convert("from-fp8", "@fp8", "--outtype q4_k_m --allow-requantize")
    yield _convert("from-fp8-block", "@fp8-block", "--outtype bf16")
    yield _convert("from-int4", "@int4", "--outtype q8_0 --allow-requantize")
    yield _convert("from-int4-asymmetric", "@int4-asymmetric", "--outtype bf16")
    yield _convert("from-torchao", "@torchao", "--outtype bf16")
    for family in FAMILIES:
        for outtype in ("f32", "bf16", "q8_0", "q4_k_m", "q2_k", "mxfp4_moe"):
            yield _convert(f"{family}/{outtype}", f"@{family}", f"--outtype {outtype} --no-vocab")
    for family in ("bamba-wide", "granite-experts-wide", "mamba2-wide", "mamba-wide"):
        for outtype in ("q5_k_m", "q3_k_m", "iq4_xs", "q4_k_m_h", "q3_k_s_h"):
            yield _convert(f"{family}/{outtype}", f"@{family}", f"--outtype {outtype} --no-vocab")
    yield _convert("bamba-biases/split", "@bamba-biases", "--outtype q8_0 --no-vocab --split-max-size 40K")
    yield _convert("with-tokenizer", "@bamba-with-tokenizer", "--outtype q8_0")


def _quantizations() -> Iterator[Case]:
    for options, method in product(FP8, ("search", "absmax")):
        short = options.split()[-1]
        for model in ("mini", "bamba-wide"):
            if model == "mini" and (short == "fp8" or method == "absmax"):
                continue  # bamba-mini does not divide into whole blocks
            yield Case(f"fp8/{model}/{short}/{method}", f"fp8 @{model} OUT {options} --scales {method}")
    for options in FP8:
        short = options.split()[-1]
        yield Case(f"fp8/imatrix/{short}", f"fp8 @bamba-wide OUT {options} --imatrix @imatrix-wide.dat")
        yield Case(f"plan/fp8/{short}", f"fp8 @bamba-wide OUT {options} --dry-run --json", "hash")
    for layout, group, method in product(INT4, (128, 64, 32), ("hqq", "mse", "rtn")):
        short = layout.replace("--format ", "").replace("--", "").replace("bits ", "bits").replace(" ", "-")
        yield Case(
            f"int4/bamba-wide/{short}-g{group}/{method}",
            f"int4 @bamba-wide OUT {layout} --group-size {group} --method {method}",
        )
        if group == 128 and method == "hqq":
            yield Case(f"int4/mini/{short}", f"int4 @mini OUT {layout}")
            yield Case(f"plan/int4/{short}", f"int4 @mini OUT {layout} --dry-run --json", "hash")
        if group == 64:
            yield Case(
                f"int4/imatrix/{short}/{method}",
                f"int4 @bamba-wide OUT {layout} --group-size 64 --method {method} --imatrix @imatrix-wide.dat",
            )
    for scheme, method in product(("nvfp4a16", "mxfp4a16"), ("search", "absmax")):
        given = f"fp4 @bamba-wide OUT --scheme {scheme} --scales {method}"
        yield Case(f"fp4/bamba-wide/{scheme}/{method}", given)
        if method == "search":
            yield Case(f"fp4/imatrix/{scheme}", f"{given} --imatrix @imatrix-wide.dat")
            yield Case(f"plan/fp4/{scheme}", f"{given} --dry-run --json", "hash")
    for mixture in ("hybrid-nvfp4", "hybrid-fp8"):
        yield Case(f"quantize/bamba-wide/{mixture}", f"quantize @bamba-wide OUT --recipe {mixture}")
    for command in ("fp8", "int4"):
        options = {
            "keep-role": "--keep ssm_in --keep '*.layers.0.*'",
            "keep-hybrid": "--keep hybrid",
            "stored": "--dtype stored",
            "shards": "--max-shard-size 400K",
        }
        for name, given in options.items():
            yield Case(f"{command}/{name}", f"{command} @bamba-wide OUT {given}")
        for family in (
            "granite", "granite-experts", "granite-attention", "mamba2", "mamba2-wide", "mamba", "falcon-mamba",
            "state-spaces", "granite-experts-wide", "bamba-tied", "bamba-biases",
        ):  # fmt: skip
            given = " --group-size 32" if command == "int4" else ""
            yield Case(f"{command}/{family}", f"{command} @{family} OUT{given}")


def _others() -> Iterator[Case]:
    for outtype in ("f32", "q8_0", "q4_k_m", "iq4_xs"):
        yield Case(f"repair/{outtype}", f"repair @wrong-{outtype}.gguf --outfile OUT/x.gguf")
    yield Case("repair/biases", "repair @wrong-bamba-biases.gguf --outfile OUT/x.gguf")
    for file in ("f32", "bf16", "q8_0", "q4_k_m", "iq4_xs", "q2_k", "split"):
        yield Case(f"export/{file}", f"export @{file}.gguf OUT")
    for dtype in ("f32", "f16", "bf16"):
        yield Case(f"export/as-{dtype}", f"export @q4_k_m.gguf OUT --dtype {dtype}")
    yield Case("export/shards", "export @bf16.gguf OUT --max-shard-size 2000K")
    yield Case("export/no-vocab", "export @q8_0.gguf OUT --no-vocab")
    yield Case("plan/export", "export @q4_k_m.gguf OUT --dry-run --json", "hash")
    for family in FAMILIES:
        yield Case(f"export/{family}", f"export @{family}-q8_0.gguf OUT --no-vocab")
        yield Case(f"inspect/{family}", f"inspect @{family} --json", "hash")
        yield Case(f"inspect/{family}-gguf", f"inspect @{family}-q8_0.gguf --json", "hash")
    for name, path in {
        "mini": "@mini",
        "gguf": "@q4_k_m.gguf",
        "split": "@split.gguf",
        "wrong": "@wrong-q8_0.gguf",
        "fp8": "@fp8",
        "int4": "@int4",
        "torchao": "@torchao",
    }.items():
        yield Case(f"inspect/{name}", f"inspect {path} --json", "hash")
    for recipe in RECIPES:
        yield Case(f"recipes/{recipe}", f"recipes {recipe}", "toml")
    yield Case("allocate/bits", "allocate @mini --target-bpw 4.6 -o OUT/x.toml --json", "figures")
    yield Case("allocate/like", "allocate @mini --like q3_k_m -o OUT/x.toml --types q2_k,q3_k,q4_k,q5_k,q6_k")


def _figures() -> Iterator[Case]:
    run = "--ctx 128 --chunks 8"
    yield Case(
        "evaluate/gguf",
        f"evaluate @mini @q4_k_m.gguf @q8_0.gguf --text @text.txt {run} --json",
        "figures",
        "",
    )
    yield Case(
        "evaluate/directories",
        f"evaluate @mini @fp8 @fp8-block @int4 @torchao --text @text.txt {run} --json",
        "figures",
        "",
    )
    yield Case(
        "evaluate/activations",
        f"evaluate @f32.gguf @q4_k_m.gguf --text @text.txt {run} --activations llama.cpp --json",
        "figures",
        "",
    )
    yield Case(
        "evaluate/file-activations",
        f"evaluate @mini @fp8 --text @text.txt {run} --activations file --json",
        "figures",
        "",
    )
    yield Case("perplexity/mini", f"perplexity @mini --text @text.txt {run} --json", "figures")
    yield Case(
        "perplexity/stream", f"perplexity @q4_k_m.gguf --text @text.txt {run} --stream --json", "figures"
    )
    yield Case("compare/gguf", "compare @mini @q4_k_m.gguf --json", "figures")
    yield Case("compare/codes", "compare @q4_k_m.gguf @measured-q4_k_m.gguf --json", "figures")
    yield Case("compare/fp8", "compare @mini @fp8 --json", "figures")
    yield Case("generate/greedy", "generate @mini --prompt 'The function' --max-tokens 24 --json", "hash")
    yield Case(
        "generate/drawn",
        "generate @q8_0.gguf --prompt 'The' --max-tokens 24 --temperature 0.8 --top-p 0.95 --seed 7 --json",
        "hash",
    )
    tuned = "--tune @text.txt --tune-tokens 2048 --tune-steps 2 --json"
    yield Case("tune/gguf", f"convert @mini --outtype q4_k_m --outfile OUT/x.gguf {tuned}", "figures", "")
    yield Case("tune/fp8", f"fp8 @mini OUT {tuned}", "figures", "")
    yield Case("tune/int4", f"int4 @mini OUT {tuned}", "figures", "")
    measured = "--text @text.txt --ctx 128 --chunks 8"
    yield Case("imatrix/mini", f"imatrix @mini {measured} -o OUT/x.gguf", files="figures")
    yield Case(
        "imatrix/output", f"imatrix @q8_0.gguf {measured} --output-tensor -o OUT/x.gguf", files="figures"
    )
    yield Case(
        "imatrix/merged", f"imatrix @mini {measured} --merge @imatrix.dat -o OUT/x.gguf", files="figures"
    )
    yield Case(
        "allocate/measured",
        "allocate @mini --like q4_k_m --text @text.txt --ctx 128 --chunks 4 -o OUT/x.toml --json",
        "figures",
        "",
    )
