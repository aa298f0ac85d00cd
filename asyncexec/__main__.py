"""`python -m asyncexec` is the command line."""

from asyncexec.cli import main

raise SystemExit(main())
