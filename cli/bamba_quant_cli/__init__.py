"""The command line: parses, calls the library, prints. Typer app in ``app``, one file a command."""
