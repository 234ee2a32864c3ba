"""Evaluates as one of the ranks that torchrun starts; tests/evaluate/test_ranks.py runs `main`.

Its arguments are RANK SIZE FOLDER [lctrain-eval's overrides].
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist

from lctrain import evaluate
from lctrain.build import build_datamodule  # noqa: F401 - it imports once what the ranks need


def main() -> None:
    """Evaluates as one of the ranks."""
    rank, size, folder = sys.argv[1:4]
    sys.argv[1:4] = []
    os.environ |= {"RANK": rank, "WORLD_SIZE": size}
    join = dist.init_process_group

    def by_file(backend, **settings):
        """Joins the ranks by a file, which needs no free port."""
        store = f"file://{Path(folder)}/rendezvous"
        join(backend, init_method=store, rank=int(rank), world_size=int(size), **settings)

    dist.init_process_group = by_file
    evaluate.main()
