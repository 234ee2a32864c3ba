"""The settings of Lightning's Trainer."""

from __future__ import annotations

from dataclasses import dataclass

from lctrain.limits import (
    check_exchange,
    check_machines,
    check_trainer,
    require,
    why_refused,
)

STRATEGIES = (
    "auto",
    "single_device",
    "ddp",
    "ddp_find_unused_parameters_false",
    "ddp_find_unused_parameters_true",
    "fsdp2",
)


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of Lightning's Trainer, and of the length of a run.

    Attributes:
        accelerator: Type of device: auto, cpu or gpu.
        devices: Number of devices, their numbers separated by commas (0,2), or auto.
        num_nodes: Number of machines.
        strategy: auto, single_device, ddp, ddp with a setting for unused parameters, or fsdp2.
            With ddp every rank has a copy of the parameters. fsdp2 divides parameters, gradients
            and optimizer states over the ranks.
        replicas: Number of copies of the parameters with strategy=fsdp2. Each copy is divided over
            ranks / replicas ranks.
        context_parallel: Number of ranks that share one pack with strategy=fsdp2. Each computes a
            part of the tokens, so a pack may be longer; an optimizer step has fewer packs.
        context_exchange: What these ranks exchange in attention: heads, keys, or auto for heads
            among as many ranks of a machine as divide the key/value heads, and keys between these
            groups.
        precision: Lightning's precision: auto (bf16-mixed on a GPU, else 32-true), 32-true,
            bf16-mixed or bf16-true.
        max_steps: Largest number of optimizer steps; -1 for no limit.
        max_time: Time after which training stops, as days:hours:minutes:seconds; None for no limit.
            It does not change the learning-rate schedule, which follows `max_steps`.
        max_epochs: Largest number of passes over the data; -1 for no limit.
        budget_s: Seconds from the start of the run to the end of training. The first steps are
            timed, and max_steps and the learning-rate schedule are shortened to fit. A resumed run
            keeps the chosen number of steps. None does not change max_steps.
        accumulate_grad_batches: Number of packs per rank in an optimizer step. Rows that do not
            fill the last step of an epoch are left out, unless an epoch has no other rows.
        gradient_clip_val: Largest gradient norm; None does not clip.
        log_every_n_steps: Optimizer steps between two rows of metrics.
        validate_every_n_steps: Optimizer steps between two validations during training. Each rank
            counts packs, validate_every_n_steps * accumulate_grad_batches of them. If an epoch has
            fewer packs than a step, later validations run between the packs of a step, without
            changing its result. None validates only before the first and after the last step.
        limit_val_batches: Number of held-out packs per rank in a validation; None for all.
        deterministic: Whether torch must use deterministic algorithms.
        enable_progress_bar: Whether to show a progress bar.
    """

    accelerator: str = "auto"
    devices: str = "1"
    num_nodes: int = 1
    strategy: str = "auto"
    replicas: int = 1
    context_parallel: int = 1
    context_exchange: str = "auto"
    precision: str = "auto"
    max_steps: int = -1
    max_time: str | None = None
    max_epochs: int = -1
    budget_s: float | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    log_every_n_steps: int = 10
    validate_every_n_steps: int | None = None
    limit_val_batches: int | None = None
    deterministic: bool = False
    enable_progress_bar: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            reason = why_refused(self.strategy)
            why = "" if reason is None else f"{reason}. "
            raise ValueError(
                f"trainer.strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}. "
                f"{why}Use fsdp2 to divide the parameters over the ranks, or ddp to copy them."
            )
        require(
            self.replicas == 1 or self.strategy == "fsdp2",
            f"trainer.replicas must be 1 with trainer.strategy={self.strategy}, got "
            f"{self.replicas}. Set trainer.strategy=fsdp2, or leave it out.",
        )
        check_exchange(self.context_exchange, self.context_parallel)
        require(
            self.context_parallel == 1 or self.strategy == "fsdp2",
            f"trainer.context_parallel must be 1 with trainer.strategy={self.strategy}, got "
            f"{self.context_parallel}. Set trainer.strategy=fsdp2, or leave it out.",
        )
        remedies = {
            "replicas": "1 divides one copy of the parameters over all ranks.",
            "num_nodes": "One machine is 1.",
            "accumulate_grad_batches": "1 takes an optimizer step after every pack.",
            "log_every_n_steps": "A large number logs little.",
            "validate_every_n_steps": "Use null to validate before and after training only.",
        }
        for name, remedy in remedies.items():
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"trainer.{name} must be at least 1, got {value}. {remedy}",
            )
        require(
            self.gradient_clip_val is None or self.gradient_clip_val >= 0.0,
            f"trainer.gradient_clip_val must be at least 0, got {self.gradient_clip_val}. Use null "
            "for no clipping.",
        )
        check_trainer(self)
        devices = self.devices_per_machine()
        if devices is None:
            return
        ranks = devices * self.num_nodes
        require(
            ranks % self.replicas == 0,
            f"trainer.replicas must divide the number of ranks, got {self.replicas} and {ranks} "
            "ranks. Change trainer.replicas, trainer.devices or trainer.num_nodes.",
        )
        check_machines(self.context_parallel, devices, self.num_nodes)
        require(
            ranks % (self.replicas * self.context_parallel) == 0,
            f"trainer.context_parallel must divide the number of ranks per replica, got "
            f"{self.context_parallel} and {ranks // self.replicas} ranks. Change "
            "trainer.context_parallel, trainer.devices or trainer.num_nodes.",
        )

    def devices_per_machine(self) -> int | None:
        """Returns the number of ranks of a machine; None if it depends on the machine."""
        if self.devices in ("auto", "-1"):
            return None
        numbers = [number for number in self.devices.split(",") if number]
        return len(numbers) if "," in self.devices else int(self.devices)
