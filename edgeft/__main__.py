"""``python -m edgeft`` is ``edgeft``."""

from edgeft.cli import main

main()
