"""Lightning callbacks for training on packs; each can be used without the other callbacks."""

from lctrain.callbacks.attention_schedule import AttentionSchedule
from lctrain.callbacks.batch_seed import BatchSeed
from lctrain.callbacks.budget import StepBudget
from lctrain.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint
from lctrain.callbacks.isolation import IsolationCheck, IsolationError
from lctrain.callbacks.length_perplexity import LengthPerplexity
from lctrain.callbacks.length_schedule import LengthSchedule
from lctrain.callbacks.long_context_eval import LongContextEval
from lctrain.callbacks.non_finite import NonFiniteLossError, NonFiniteLossGuard
from lctrain.callbacks.patch_attention import PatchAttention
from lctrain.callbacks.progress import TokenProgressBar
from lctrain.callbacks.resume_order import ResumeOrder
from lctrain.callbacks.throughput import ThroughputMonitor
from lctrain.callbacks.token_exact import TokenExactLoss

__all__ = [
    "AtomicCheckpointIO",
    "AttentionSchedule",
    "BatchSeed",
    "IsolationCheck",
    "IsolationError",
    "LengthPerplexity",
    "LengthSchedule",
    "LongContextEval",
    "NonFiniteLossError",
    "NonFiniteLossGuard",
    "PatchAttention",
    "ResumeOrder",
    "StepBudget",
    "StepCheckpoint",
    "ThroughputMonitor",
    "TokenExactLoss",
    "TokenProgressBar",
]
