"""The tests; a package so that `tests.numerics` is this one and no other."""
