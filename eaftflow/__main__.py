"""`python -m eaftflow`."""

from eaftflow.cli import main

main()
