"""`python -m slipstream.cli`, and so `torchrun -m slipstream.cli`."""

from slipstream.cli import main

main()
