"""Names the SLURM job of this process, and requeues it."""

from __future__ import annotations

import logging
import os
import subprocess

log = logging.getLogger(__name__)

PATIENCE_S = 60  # seconds to wait for SLURM's answer


def slurm_job() -> str | None:
    """Returns this process's SLURM job, or array job and task; it stays the same after a requeue.

    It is None outside of SLURM.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def requeue() -> None:
    """Asks SLURM to queue this job again, and logs a warning if SLURM refuses.

    Lightning's plugin is not used for this: it writes a checkpoint of its own, which Lightning
    would load instead of the run's newer checkpoints.
    """
    job = slurm_job()
    if job is None:
        return
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=PATIENCE_S
        )
        refusal = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        refusal = str(error)
    if refusal is None:
        log.info("SLURM has queued job %s again.", job)
    else:
        log.warning(
            "SLURM did not queue job %s again: %s. Submit it anew with ckpt_path=last.",
            job,
            refusal,
        )
