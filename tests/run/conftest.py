"""Imports the fixtures of tests/train: a small corpus, and overrides for a tiny run."""

from tests.train.conftest import corpus, tiny

__all__ = ["corpus", "tiny"]
