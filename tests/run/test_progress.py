"""Tests the conversion of a checkpoint's counts to another number of accumulated packs."""

import pytest

from lctrain.run.progress import convert_progress


def checkpoint(processed):
    """Returns the counts that Lightning saves at the end of a batch, which is not completed."""
    counts = {"ready": processed, "started": processed, "processed": processed}
    counts["completed"] = processed - 1
    progress = {"total": dict(counts), "current": dict(counts)}
    return {"loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}


@pytest.mark.parametrize(("then", "now", "batches"), [(1, 4, 24), (2, 1, 3), (3, 3, 6)])
def test_optimizer_steps_stay_the_same(then, now, batches):
    found = checkpoint(6)
    convert_progress(found, then, now)
    for counts in found["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        assert counts == {
            "ready": batches,
            "started": batches,
            "processed": batches,
            "completed": batches - 1,
        }


def test_a_checkpoint_within_a_step_is_refused():
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 4 for a checkpoint with"):
        convert_progress(checkpoint(6), 4, 2)


@pytest.mark.parametrize(("steps", "accepted"), [(6, True), (3, False), (4, False)])
def test_an_older_run_that_accumulated_is_refused(steps, accepted):
    """Its rows are in another order, and its checkpoint does not say so."""
    found = {**checkpoint(6), "global_step": steps}
    if accepted:
        convert_progress(found, None, 1)
        assert found == {**checkpoint(6), "global_step": steps}
    else:
        with pytest.raises(ValueError, match=r"got 6 batches in .* Start a new run"):
            convert_progress(found, None, 1)
