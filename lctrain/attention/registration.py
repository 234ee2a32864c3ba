"""Registers lctrain_flash with transformers, so that from_pretrained knows the name too.

A model loaded by name keeps documents apart as a patched one does, layer by layer and without
patch_model's checks of the architecture. One thing only the input hook of patch_model can see:
transformers hands the position ids of bidirectional encoders to no layer and no mask, so an encoder
loaded by name needs `cu_seq_lens_q/k` and `max_length_q/k` for packs, or padded rows.
"""

import functools
from typing import Any

from lctrain.attention.forward import flash_attention_forward
from lctrain.attention.mask import flash_attention_mask
from lctrain.attention.spec import ATTENTION_NAMES

_MARK = "_lctrain_knows_its_names"


def register() -> None:
    """Registers attention and mask function. Imports transformers; harmless if done before."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    name = ATTENTION_NAMES["flash"]
    AttentionInterface.register(name, flash_attention_forward)
    AttentionMaskInterface.register(name, flash_attention_mask)
    _accept_names(PreTrainedModel)


def _accept_names(model_class: Any) -> None:
    """Lets transformers take our names for what they are.

    It believes that every name with "flash" in it is a build of FlashAttention: it would look for
    one on the hub and refuse to construct the model (transformers 5.17 and 5.23), or swap the name
    for a kernel of its own choice. All other names go the original way.
    """
    original = model_class._check_and_adjust_attn_implementation
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation not in ATTENTION_NAMES.values():
            return original(self, attn_implementation, *args, **kwargs)
        if not self._supports_flash_attn:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} needs a model whose masks are causal "
                f"or full, with windows, padding or packing; transformers says that "
                f"{type(self).__name__} is not one (_supports_flash_attn is False). Load it with "
                "attn_implementation='sdpa' or 'eager'."
            )
        return attn_implementation

    setattr(check, _MARK, True)
    model_class._check_and_adjust_attn_implementation = check
