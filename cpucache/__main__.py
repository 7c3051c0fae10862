"""``python -m cpucache``: the command, where it is not on the path."""

from cpucache.cli.main import main

main()
