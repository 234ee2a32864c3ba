"""run_in_threads: runs a function on every rank of a topology, each rank a thread."""

import functools
import threading

from lctrain.distributed import Topology

LIMIT_S = 60


def run_in_threads(function, size):
    """Returns what a function of a Topology returns on every rank, or the error that it raises.

    Only collectives of objects work, such as `gather`. Where the ranks take part in different
    numbers of exchanges, one raises threading.BrokenBarrierError.
    """
    barrier = threading.Barrier(size, timeout=LIMIT_S)
    values, found = [None] * size, [None] * size

    def exchange(rank, value):
        values[rank] = value
        barrier.wait()
        together = list(values)
        barrier.wait()
        return together

    def call(rank):
        topology = Topology(rank, size)
        object.__setattr__(topology, "_exchange", functools.partial(exchange, rank))
        try:
            found[rank] = function(topology)
        except Exception as error:
            found[rank] = error
            if not hasattr(error, "lctrain_told"):
                barrier.abort()

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
