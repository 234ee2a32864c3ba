"""The candidates of the tuner are valid entries of the tables."""

import pytest

pytest.importorskip("triton")

from lctrain_kernels.bench import tune
from lctrain_kernels.gluon import barriers
from lctrain_kernels.gluon.config import (
    DIFFERENTIAL_COLUMNS,
    backward_tile,
    differential_backward_tile,
    forward_tile,
)
from lctrain_kernels.tile.config import _OVERRIDES

OFFERED = [
    (operation, head_dim, candidate)
    for operation, by_head_dim in tune._CANDIDATES.items()
    for head_dim, candidates in by_head_dim.items()
    for candidate in candidates.split()
]


@pytest.mark.parametrize(("operation", "head_dim", "candidate"), OFFERED)
def test_a_candidate_is_forced_and_given_up(operation, head_dim, candidate):
    columns = max(64, 128 if head_dim == 96 else head_dim)
    numbers = [int(part) for part in candidate.split(",")]
    look = {
        "hopper_fwd": lambda: forward_tile(columns, 1, False),
        "hopper_bwd": lambda: backward_tile(columns, False),
    }.get(operation, lambda: _OVERRIDES.get(operation))
    before = look()
    with tune.override(operation, candidate):
        found = look()
        if operation.startswith("hopper"):
            assert list(map(int, found)) == numbers
        else:
            assert [found.block_m, found.block_n, found.num_warps] == numbers[:3]
    assert look() == before


def test_every_stage_has_a_named_barrier():
    for operation in ("hopper_fwd", "hopper_bwd"):
        for candidates in tune._CANDIDATES[operation].values():
            for candidate in candidates.split():
                assert 2 <= int(candidate.split(",")[1]) <= barriers.MOST_STAGES, candidate
    for dims in DIFFERENTIAL_COLUMNS:
        if dims != (128, 128, False):
            stages = differential_backward_tile(*dims).stages
            assert barriers.barriers_fit("differential_bwd", stages)


@pytest.mark.parametrize("columns", [64, 128])
def test_the_tiles_in_use_are_offered(columns):
    used = [("hopper_fwd", forward_tile(columns, pack, False)) for pack in (1, 4)]
    for operation, tile in [*used, ("hopper_bwd", backward_tile(columns, False))]:
        candidate = ",".join(str(int(number)) for number in tile)
        assert candidate in tune._CANDIDATES[operation][columns].split()
