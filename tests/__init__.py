"""The tests. They are a package, so that `import tests.numerics` finds this folder and no other."""
