"""`python -m tkit`."""

from tkit.cli.main import main

main()
