"""Trains on two ranks, kills both, and resumes them; tests/data/test_resume.py starts it.

Usage: python -m tests.data.killed_ranks CORPUS FOLDER

The runs are forked from this process, which imports torch once. Their ranks join by a file: a free
port that Lightning chooses may be taken before its rank 0 listens to it.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from tests.data.train_recorded import finished_batches, recorded, train
from tests.distributed.ranks import fork_ranks

RANKS = 2


def run(folder: Path, corpus: str, resume: bool = False, dies_at: int | None = None) -> bool:
    """Trains on all ranks, and returns whether they finished.

    Args:
        folder: Folder of the run.
        corpus: Folder of the texts.
        resume: Whether to resume from the last checkpoint of the folder.
        dies_at: Batch at which all ranks are killed; None if they are not.
    """
    options = argparse.Namespace(
        corpus=corpus, folder=folder, workers=1, resume=resume, dies_at=dies_at
    )
    meeting = folder / f"ranks-{'resumed' if resume else 'new'}"
    meeting.mkdir(parents=True)
    try:
        fork_ranks(partial(main, options), RANKS, meeting)
    except SystemExit:
        return False
    return True


def main(options: argparse.Namespace, rank: int, size: int, folder: Path) -> None:
    """Trains as one of the ranks."""
    train(options, rank, size)


if __name__ == "__main__":
    corpus, root = sys.argv[1], Path(sys.argv[2])
    assert run(root / "whole", corpus)
    assert not run(root / "dead", corpus, dies_at=13)
    found = {
        "start": finished_batches(root / "dead" / "checkpoints" / "last.ckpt"),
        "dead": recorded(root / "dead"),
    }
    assert run(root / "dead", corpus, resume=True)
    (root / "found.json").write_text(json.dumps(found))
