"""Attention: SDPA for plain causal rows; one op for packed documents, padding, sliding windows and sinks."""
