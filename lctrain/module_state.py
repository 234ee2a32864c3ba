"""What LongContextModule stores in a checkpoint, and what it restores from one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lctrain.models.from_config import describe
from lctrain.models.low_rank import adapter_state, has_reloaded_base, load_adapter_state
from lctrain.options import check_same_options
from lctrain.run.length import STEPS_KEY, warn_if_ended
from lctrain.run.progress import convert_progress

STATE_KEY = "lctrain"  # checkpoint key of the module's own state
# Checkpoint key of the arguments with which `load_from_checkpoint` builds the module.
HYPER_PARAMETERS = pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY

_MODEL = "model."  # prefix of the model's names in the module's state dict


def save_module(module: Any, checkpoint: dict[str, Any]) -> None:
    """Adds a module's arguments, optimizer options and losses to a checkpoint.

    Args:
        module: The LongContextModule.
        checkpoint: Lightning's checkpoint. If lctrain has added adapters to a pretrained model, its
            `state_dict` is replaced by the adapters' weights.
    """
    if has_reloaded_base(module.model):
        adapters = adapter_state(module.model)
        checkpoint["state_dict"] = {f"{_MODEL}{name}": x for name, x in adapters.items()}
    description = describe(module.model)
    if description is not None:
        checkpoint[HYPER_PARAMETERS] = {
            "model": description,
            "optim": asdict(module.optim),
            "attention": None if module.attention is None else asdict(module.attention),
            "seed": module.seed,
            "memory": None if module.memory is None else asdict(module.memory),
            "task": module.task,
        }
    checkpoint[STATE_KEY] = {
        "optim": asdict(module.optim),
        "first_loss": None if module.first_loss is None else module.first_loss.item(),
        "held_out_losses": list(module.held_out_losses),
        "held_out_set_losses": dict(module.held_out_set_losses),
        "accumulated": module.trainer.accumulate_grad_batches,
    }


def restore_module(module: Any, checkpoint: dict[str, Any]) -> None:
    """Restores a module's losses, and compares the run with its checkpoint.

    Args:
        module: The LongContextModule.
        checkpoint: Lightning's checkpoint. If it holds adapters, their weights are loaded, and its
            `state_dict` is emptied.

    Raises:
        ValueError: if training resumes with changed optimizer options, or with fewer steps than the
            checkpoint has taken.
    """
    if has_reloaded_base(module.model) and "state_dict" in checkpoint:  # shards are loaded before
        saved = checkpoint["state_dict"]
        load_adapter_state(module.model, {n.removeprefix(_MODEL): x for n, x in saved.items()})
        checkpoint["state_dict"] = {}  # the frozen weights are loaded from their source
    state = checkpoint.get(STATE_KEY)
    if state is None:
        return
    if module._trainer is not None and module._trainer.state.fn == TrainerFn.FITTING:
        warn_if_ended(checkpoint[STEPS_KEY], module._trainer.max_steps)
        check_same_options(module.optim, state.get("optim", {}))
        now = module.trainer.accumulate_grad_batches
        convert_progress(checkpoint, state.get("accumulated"), now)
    if state["first_loss"] is not None:
        module.first_loss = torch.tensor(state["first_loss"], dtype=torch.float64)
    module.held_out_losses = [tuple(pair) for pair in state["held_out_losses"]]
    module.held_out_set_losses = dict(state.get("held_out_set_losses", {}))
