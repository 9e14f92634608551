"""`python -m irkit`: the command line."""

from irkit.cli import main

main()
