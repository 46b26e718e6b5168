"""``python -m fedpeft.cli``."""

from fedpeft.cli import main

main()
