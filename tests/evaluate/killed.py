"""Runs lctrain-eval with given arguments, and kills itself inside the cell of a given number."""

import os
import signal
import sys

from lctrain.eval.run_task import Run
from lctrain.evaluate import main

if __name__ == "__main__":
    number = int(sys.argv.pop(1))
    compute = Run._result
    begun = []

    def result(self, reading, length, advance):
        """Computes a cell; the last one is computed, but not stored."""
        found = compute(self, reading, length, advance)
        begun.append(length)
        if len(begun) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Run._result = result
    main()
