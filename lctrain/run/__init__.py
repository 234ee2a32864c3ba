"""The life of a run: its folder, its lock, its identity, its checkpoint files and its end."""
