"""``python -m cpucache``: runs the command line where ``cpucache`` is not on the PATH."""

from cpucache.cli.main import main

main()
