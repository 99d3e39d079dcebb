"""`python -m ollm_core.cli` is `ollm`."""

from ollm_core.cli.main import main

main()
