"""Files of weights: what exists, fetching, checkpoints, export."""
