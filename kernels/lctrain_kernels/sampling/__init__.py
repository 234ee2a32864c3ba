"""The choice of a token per row of logits: the most probable one, or a draw."""
