"""Compiled twins of schemes: one thread's work on a chunk of rows, free of the interpreter lock, bit for bit."""
