"""Tests that a cache argument is found under its names before and since transformers 5.24."""

import pytest

from lctrain.models.cache import given_cache, without_cache


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_given_under_either_name(name):
    cache = object()
    assert given_cache({name: cache, "use_cache": True}) is cache
    assert without_cache({name: cache, "use_cache": True}) == {"use_cache": True}


def test_not_given():
    assert given_cache({"cache": None, "past_key_values": None}) is None
