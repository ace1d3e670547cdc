"""Kernels in numba that quantize a chunk of rows on one thread, without the interpreter lock.

Why numba, with vectors of its own: the search of Q4_K without importance, on one core of a Zen 5, does in
Mweights/s 11 in numpy, 10 in torch with numpy's plan, 66 in C with GCC 12's vector types, 250 here; ggml's
C does 20. An extension would also need a compiler, or a wheel for each platform, where the package is
installed; numba compiles for the processor it runs on. Left alone, LLVM vectorises none of these searches:
inside a block, sums run in order.
"""
