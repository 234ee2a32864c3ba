"""Compiles the device functions of ranges.py as Gluon, for the Hopper kernels."""

from triton.experimental import gluon

from lctrain_kernels.dual_chunk import ranges
from lctrain_kernels.gluon.primitives import with_callees

chunk_begin = gluon.jit(ranges.chunk_begin.fn)
inter_end = with_callees(ranges.inter_end, chunk_begin=chunk_begin)
keys_of_query = with_callees(ranges.keys_of_query, chunk_begin=chunk_begin, inter_end=inter_end)
keys_of_tile = with_callees(
    ranges.keys_of_tile, chunk_begin=chunk_begin, inter_end=inter_end, keys_of_query=keys_of_query
)
queries_of_key = with_callees(ranges.queries_of_key, chunk_begin=chunk_begin)
queries_of_tile = with_callees(ranges.queries_of_tile, queries_of_key=queries_of_key)
