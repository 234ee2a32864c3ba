"""Callbacks of a training run; each is independent of the others."""

from lctrain.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint
from lctrain.callbacks.isolation import IsolationCheck, IsolationError
from lctrain.callbacks.length_perplexity import LengthPerplexity
from lctrain.callbacks.non_finite import NonFiniteLossError, NonFiniteLossGuard
from lctrain.callbacks.progress import TokenProgressBar
from lctrain.callbacks.throughput import ThroughputMonitor

__all__ = [
    "AtomicCheckpointIO",
    "IsolationCheck",
    "IsolationError",
    "LengthPerplexity",
    "NonFiniteLossError",
    "NonFiniteLossGuard",
    "StepCheckpoint",
    "ThroughputMonitor",
    "TokenProgressBar",
]
