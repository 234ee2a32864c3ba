"""The most probable token of each row of logits, and its log-probability."""
