"""``python -m bamba_quant_cli`` is ``bamba-quant``."""

from bamba_quant_cli.app import main

if __name__ == "__main__":
    main()
