"""A run on disk: its folder, lock, identity and checkpoints, resume, and signals that stop it."""
