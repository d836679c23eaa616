"""An account of a run as one HTML file, made from what the run wrote down."""
