"""The small corpus and the tiny run of tests/train."""

from tests.train.conftest import corpus, tiny

__all__ = ["corpus", "tiny"]
