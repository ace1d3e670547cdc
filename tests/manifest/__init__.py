"""A manifest of every command's output: hashes of files, and figures of reports.

It is for changes that must not change an output. ``manifest.json`` holds one entry for each output file of each case
in ``cases.py``. A case is one command line, so the same cases run on older and newer code.

    python -m tests.manifest                    # compare with manifest.json; exit code 1 if anything differs
    python -m tests.manifest --only 'fp8'       # the cases whose names match *fp8*
    python -m tests.manifest --write            # record the outputs of this code
    python -m tests.manifest --list             # the names of the cases

What an entry is:

- GGUF: one hash of the key-value pairs (without the value of the version key) and one of tensor entries and data.
- safetensors: one hash of ``__metadata__`` and one of the rest of the header and the data.
- other files: one hash; a version after the program's name is replaced first.
- JSON on stdout: a hash, or for measured figures a summary of the numbers, which is compared with a tolerance.

Inputs are bamba-mini and small random models, drawn by numpy from fixed seeds. Text for people (dry runs, tables) is
not recorded. ``differences.md`` explains each entry that was changed on purpose.
"""
