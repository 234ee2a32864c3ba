"""Registers lctrain's attention and model families with transformers.

- `register` adds the attention names, such as "lctrain_flash", so that from_pretrained accepts
  them. A model that is loaded with such a name gets the checks and input hooks of patch_model; see
  `lctrain.models.late_hook`.
- `register_families` adds the families of the models that `to_differential` returns, so that
  AutoConfig and AutoModelForCausalLM can load them.
"""

import functools
from collections.abc import Callable
from typing import Any

from lctrain.attention.differential import differential_attention_forward
from lctrain.attention.dual_chunk import dual_chunk_attention_forward
from lctrain.attention.flash import flash_attention_forward
from lctrain.attention.mask import flash_attention_mask
from lctrain.attention.spec import ATTENTION_NAMES
from lctrain.models.architectures import require_supported_class
from lctrain.models.batching import require_batching
from lctrain.models.late_hook import begin, finish, prepare

_MARK = "_lctrain_knows_its_names"
_HOOK = "_lctrain_hook"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "flash": flash_attention_forward,
    "dual_chunk": dual_chunk_attention_forward,
    "differential": differential_attention_forward,
}


def register() -> None:
    """Registers lctrain's attention and mask functions with transformers.

    Imports transformers. A second call changes nothing.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    for kind, function in _FUNCTIONS.items():
        AttentionInterface.register(ATTENTION_NAMES[kind], function)
        AttentionMaskInterface.register(ATTENTION_NAMES[kind], flash_attention_mask)
    _accept_names(PreTrainedModel)
    _serve_batches()


def register_families_on_demand() -> None:
    """Makes AutoConfig register the differential model families when it is first used.

    The families cannot be registered at once: their classes derive from transformers' model
    classes, which cannot be imported while AutoConfig's module is still being imported.
    """
    from transformers.models.auto.configuration_auto import AutoConfig

    original = vars(AutoConfig)["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if vars(AutoConfig)["from_pretrained"] is wrapper:
            AutoConfig.from_pretrained = original  # type: ignore[method-assign]
        register_families()
        return original.__get__(None, cls)(*args, **kwargs)

    wrapper = classmethod(from_pretrained)
    AutoConfig.from_pretrained = wrapper  # type: ignore[method-assign, assignment]


def register_families() -> None:
    """Registers the differential families with AutoConfig and AutoModelForCausalLM."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lctrain.models.differential_v2 import MODELS

    for model in MODELS.values():
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


def _accept_names(model_class: Any) -> None:
    """Makes a model class of transformers accept lctrain's attention names.

    transformers treats every name that contains "flash" as a build of FlashAttention: it looks for
    a kernel on the hub and refuses to construct the model (transformers 5.17 and 5.23), or replaces
    the name by another kernel. Names that are not lctrain's are still handled by transformers.

    Args:
        model_class: transformers' PreTrainedModel.
    """
    original = model_class._check_and_adjust_attn_implementation
    if getattr(original, _MARK, False):
        return
    post_init, correct = model_class.post_init, model_class.get_correct_attn_implementation

    @functools.wraps(original)
    def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation is None or attn_implementation not in ATTENTION_NAMES.values():
            return original(self, attn_implementation, *args, **kwargs)
        require_supported_class(type(self))
        if len(self._modules) == 0:
            begin(self, attn_implementation)
        else:
            prepare(self, attn_implementation)
        return attn_implementation

    @functools.wraps(correct)
    def check_part(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        """Checks the attention name for one part of a model, and prepares the part.

        An outer model's set_attn_implementation calls this method of every part.
        """
        if requested_attention not in ATTENTION_NAMES.values():
            return correct(self, requested_attention, *args, **kwargs)
        return check(self, requested_attention)

    @functools.wraps(post_init)
    def check_when_complete(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = post_init(self, *args, **kwargs)
        finish(self)
        return result

    setattr(check, _MARK, True)
    model_class._check_and_adjust_attn_implementation = check
    model_class.get_correct_attn_implementation = check_part
    model_class.post_init = check_when_complete


def _serve_batches() -> None:
    """Makes transformers' continuous batching serve lctrain's attention names.

    A release without the names below is left as it is. transformers looks at the attention's name
    in three places:

    - The manager refuses names without "flash" (5.23), or writes "paged|" before a name (5.17).
    - The plan of a batch has a mask and no CUDA graphs, unless the name contains "flash".
    - Block tables are for builds of FlashAttention on a GPU. Without them, each step gathers the
      keys of all requests.
    """
    try:
        from transformers.generation.continuous_batching import (
            cache,
            continuous_api,
            initialization,
        )
    except ImportError:
        return
    manager = getattr(continuous_api, "ContinuousBatchingManager", None)
    switch = getattr(manager, "switch_to_cb_friendly_attn", None)
    ensure = getattr(initialization, "ensure_decode_fast_path_is_available", None)
    if manager is None or switch is None or ensure is None or hasattr(switch, _MARK):
        return

    @functools.wraps(switch)
    def check(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        name = model.config._attn_implementation
        hook = require_batching(model) if name in ATTENTION_NAMES.values() else None
        if getattr(self, _HOOK, hook) is not hook:
            raise ValueError(
                "a kept manager must generate with the attention that it was made for, got a model "
                "whose attention was changed since. Call "
                "model.destroy_cached_continuous_batching_manager() first."
            )
        setattr(self, _HOOK, hook)
        if hook is None:
            switch(self, model, *args, **kwargs)

    @functools.wraps(ensure)
    def give_tables(config: Any, batching: Any, *args: Any, **kwargs: Any) -> None:
        ours = config._attn_implementation in ATTENTION_NAMES.values()
        if not (ours and _has_tables(config, initialization) and _has_page(batching)):
            ensure(config, batching, *args, **kwargs)  # it takes no tables for lctrain's names

    setattr(check, _MARK, True)
    manager.switch_to_cb_friendly_attn = check
    initialization.ensure_decode_fast_path_is_available = give_tables  # type: ignore[assignment]
    for module in (cache, initialization):
        if (requested := getattr(module, "is_flash_attention_requested", None)) is not None:
            module.is_flash_attention_requested = _with_names(requested)  # type: ignore[attr-defined]


def _with_names(original: Callable[..., bool]) -> Callable[..., bool]:
    """Returns transformers' is_flash_attention_requested, True for lctrain's names too."""

    @functools.wraps(original)
    def requested(
        config: Any = None, requested_attention_implementation: Any = None, version: Any = None
    ) -> bool:
        name = requested_attention_implementation
        if (name if config is None else config._attn_implementation) in ATTENTION_NAMES.values():
            return version is None
        return original(config, name, version)

    return requested


def _has_tables(config: Any, initialization: Any) -> bool:
    """Returns whether the caches of a model's layers have block tables.

    Args:
        config: Config of a causal LM.
        initialization: transformers' module of this name. In 5.17 it does not say so, and the
            cache itself turns block tables off.
    """
    group_layers = getattr(initialization, "group_layers_by_attn_type", None)
    allocators = getattr(initialization, "ATTN_TYPE_TO_ALLOCATOR", None)
    if group_layers is None or allocators is None:
        return True
    kinds = [allocators[kind] for kind in group_layers(config)]
    return all(getattr(kind, "supports_block_table", False) for kind in kinds)


def _has_page(batching: Any) -> bool:
    """Returns whether the decode kernels have pages of the size that a batch is configured with."""
    from lctrain_kernels.decode.checks import MAX_PAGE, MIN_PAGE

    sizes = (getattr(batching, name, None) for name in ("page_size", "block_size"))
    size: int = next(size for size in sizes if size is not None)
    return MIN_PAGE <= size <= MAX_PAGE and size & (size - 1) == 0
