"""What a machine has, what of it works, and what is set up wrongly."""
