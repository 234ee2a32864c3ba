"""Tests copies of functions in which a global name means another object, under decorators too."""

import functools
import warnings

from transformers.utils.deprecation import deprecate_kwarg

from lctrain.models.code import only_renames_arguments, same_code, with_globals


def double(x):
    """Stands for the rotation that is replaced."""
    return 2 * x


def plain(x, cache=None):
    """Stands for an attention's forward, which calls the rotation."""
    return double(x), cache


renamed = deprecate_kwarg("past_key_values", "99.0.0", new_name="cache")(plain)


def other(function):
    """A decorator that lctrain does not know."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


def test_other_things_are_found_under_a_name():
    found = with_globals(plain, double=lambda x: 3 * x)
    assert found(1) == (3, None)
    assert plain(1) == (2, None)


def test_renamed_arguments_stay_renamed():
    """A decorator of transformers 5.24 renames past_key_values in every attention's forward."""
    found = with_globals(renamed, double=lambda x: 3 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found(1, past_key_values=5) == (3, 5)
        assert renamed(1, past_key_values=5) == (2, 5)
    assert same_code(found, plain)


def test_only_renamed_arguments_are_looked_through():
    assert only_renames_arguments(plain)
    assert only_renames_arguments(renamed)
    assert not only_renames_arguments(other(plain))
    assert not only_renames_arguments(other(renamed))
