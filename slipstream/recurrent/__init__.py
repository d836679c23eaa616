"""Layers with a state along the row (Mamba, Mamba2, Gated DeltaNet): documents kept apart, memory kept small."""
