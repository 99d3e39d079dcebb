"""`python -m ollm_core.cli` is `ollm`."""

from ollm import main

main()
