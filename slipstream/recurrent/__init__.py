"""Layers with a state that runs along the row (Mamba2, Gated DeltaNet): documents kept apart, memory kept small."""
