"""SLURM: which job this is, and how it is queued again."""

from __future__ import annotations

import logging
import os
import subprocess

log = logging.getLogger(__name__)

PATIENCE_S = 60  # for the answer of SLURM


def slurm_job() -> str | None:
    """The job and task of SLURM that this process belongs to, the same after a requeue."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def requeue() -> None:
    """Asks SLURM to queue this job again; a refusal is a warning.

    Lightning's plugin does the same after writing a checkpoint of its own, which would be loaded in
    place of the run's later ones.
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
