"""lctrain: long-context training for PyTorch Lightning."""
