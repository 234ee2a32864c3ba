"""The small corpus and the tiny run of tests/test_train.py."""

from tests.test_train import corpus, tiny

__all__ = ["corpus", "tiny"]
