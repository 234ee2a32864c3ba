import numpy as np
import pytest

from lctrain.data import TokenizedDocument

VOCABULARY = 97


@pytest.fixture
def documents() -> list[TokenizedDocument]:
    """Four documents of 45, 2, 17 and 1 random tokens."""
    generator = np.random.default_rng(0)
    return [
        TokenizedDocument(f"document-{index}", generator.integers(VOCABULARY, size=size), index)
        for index, size in enumerate((45, 2, 17, 1))
    ]
