"""`python -m cifarlab`."""

from cifarlab.cli import main

main()
