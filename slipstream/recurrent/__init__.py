"""Layers with a state along the row (Mamba, Mamba2, Gated DeltaNet, RG-LRU): documents kept apart, memory small."""
