"""What the Hopper kernels have and the table leaves to the portable ones for now."""

HELD_BACK = ("the backward of dropout", "a deterministic backward")


def without_held_back(limits):
    """The rows of a table in lctrain.kernels.hopper.support but for those."""
    left = tuple(row for row in limits if row[0] not in HELD_BACK)
    assert len(left) == len(limits) - len(HELD_BACK)
    return left
