"""The benchmark: a training step of real shapes, ours and others' in turn. `slipstream bench --help`."""
