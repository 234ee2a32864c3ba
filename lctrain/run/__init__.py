"""Folder, lock, identity, checkpoint files, resume and signals of a run."""
