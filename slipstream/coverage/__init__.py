"""Every causal-LM architecture of the installed Transformers, checked and timed. `slipstream coverage --help`."""
