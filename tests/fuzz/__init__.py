"""A seeded, structured fuzzer of everything that reads a file: an error that names what is wrong, or a right result.

Each reader has valid inputs, mutations that know their format, and a call that does what the commands do. A case is
good when it ends with success or a ``BambaQuantError``. Failures are any other exception (panics of Rust code and
warnings among them), more than 5 s, more than 1 GiB above idle, a worker that died, a file left behind, an error text
of thousands of characters, control characters in what a command prints, a valid input that is refused, and a file
that is accepted although its own library refuses it.

    make fuzz                                                   # 100,000 cases on two processes
    python -m tests.fuzz --seed 3 --cases 20000                 # other cases
    python -m tests.fuzz --reader gguf --reader imatrix_gguf    # some readers
    python -m tests.fuzz --reader gguf --seed 3 --case 1234     # one case again, with its whole traceback
    python -m tests.fuzz --keep failing                         # keep the inputs of failures
    python -m tests.fuzz --list                                 # the readers

A case depends on the reader, the seed and its number alone. The first cases of a reader are its valid inputs.

To add a reader, decorate its call in a file of ``tests/fuzz/readers`` (each file there is imported):

    @reader("gates", seeds=gates_files, mutate=files({"gates.toml": toml_text}), weight=3)
    def gates(case: Case) -> None:
        read_gates(case.path / "gates.toml")

``seeds`` gives valid trees, ``{file name: bytes}``, once a run; ``mutate(random, tree)`` gives another tree;
``case.path`` is a directory with that tree. ``tree.py`` lists what may stand there instead of bytes: a FIFO, a link, a
file that shrinks while it is read.
"""
