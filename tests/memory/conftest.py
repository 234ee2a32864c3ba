"""Fixtures of the memory tests."""

import pytest

import lctrain
from tests.models.families import make_documents


@pytest.fixture
def packs():
    """Two packs of different lengths in transformers' format."""
    documents = make_documents()
    return [
        lctrain.PackedBatch.from_documents(part).arguments() for part in (documents, documents[2:])
    ]
