"""Kills the commands that write, at random moments and at every call that changes a name: ``python -m tests.crash``."""
