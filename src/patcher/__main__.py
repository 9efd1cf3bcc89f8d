"""`python -m patcher`, and so `torchrun -m patcher`."""

from patcher.cli import main

main()
