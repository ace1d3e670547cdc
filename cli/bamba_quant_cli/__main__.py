"""``python -m bamba_quant_cli`` is ``bamba-quant``."""

from bamba_quant_cli import interrupts


def main() -> None:
    """Run the command line; its modules are imported once a signal ends the process as it should."""
    interrupts.run(_run)


def _run() -> None:
    from bamba_quant_cli import app

    app.run()


if __name__ == "__main__":
    main()
