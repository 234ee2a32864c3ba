"""MemoryBench: the model of one contender, and its training steps under a memory policy."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from lctrain.bench.contenders import CONTENDERS, OURS, Contender
from lctrain.bench.layer_progress import LayerProgress, Report
from lctrain.bench.memory_peer import checkpoint_layers
from lctrain.bench.shapes import ModelShape, build_shape
from lctrain.bench.step_process import random_pack, time_step
from lctrain.config import AdapterConfig, MemoryConfig
from lctrain.loss import causal_lm_loss
from lctrain.memory.layers import checkpointed_layers
from lctrain.memory.plan import GIB, Plan
from lctrain.memory.policy import apply_config, plan_for
from lctrain.models import patch_model
from lctrain.models.low_rank import add_adapter, leave_casts_to_autocast
from lctrain_kernels.bench.compilations import loaded_kernels


@dataclass(frozen=True)
class Steps:
    """Which steps a measurement runs.

    Attributes:
        warmup: Number of steps before the timed ones.
        warmup_tokens: Number of tokens of the steps before, which compile the kernels and pin the
            host memory; None for the number of tokens of the timed steps.
        timed: Number of timed steps.
        documents: Number of documents of equal length in the pack.
    """

    warmup: int = 1
    warmup_tokens: int | None = None
    timed: int = 2
    documents: int = 1


@dataclass
class MemoryBench:
    """The model of one contender, and how it is measured.

    Attributes:
        contender: The contender.
        model: Its model, with adapters if these are trained, on the device of the measurement.
        shape: Shape of the model.
        precision: "bf16-mixed" on a GPU, as in training, else "true".
        steps: The steps of a measurement.
        initial: Values of the trained weights at the beginning of every measurement.
    """

    contender: Contender
    model: Any
    shape: ModelShape
    precision: str
    steps: Steps
    initial: tuple[torch.Tensor, ...] = field(default=(), repr=False)

    @classmethod
    def build(
        cls,
        name: str,
        shape: ModelShape,
        device: torch.device,
        precision: str,
        rank: int | None,
        steps: Steps,
    ) -> MemoryBench:
        """Builds a contender's model with random weights.

        Args:
            name: Name of the contender.
            shape: Shape of the model.
            device: Device of the model; "meta" for plans only.
            precision: "bf16-mixed" or "true".
            rank: Rank of the adapters, with frozen bfloat16 weights; None trains all weights, in
                float32.
            steps: The steps of a measurement.
        """
        contender = CONTENDERS[name]
        dtype = torch.bfloat16 if precision == "bf16-mixed" and rank is not None else torch.float32
        model: Any
        if name == OURS:
            model = build_shape(shape, "sdpa", device, dtype)
            patch_model(model, fused=True)
        else:
            model = contender.build(shape, device, dtype)
        if rank is not None:
            model = add_adapter(model, AdapterConfig(rank=rank))
        model.train()
        if name == OURS and precision == "bf16-mixed":
            leave_casts_to_autocast(model)
        trained = [p.detach() for p in model.parameters() if p.requires_grad]
        is_real = device.type != "meta"
        initial = tuple(p.to("cpu", copy=True) for p in trained) if is_real else ()
        return cls(contender, model, shape, precision, steps, initial)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def inner(self) -> Any:
        """The model without adapters around it."""
        model = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def planned(self, config: MemoryConfig, tokens: int) -> tuple[Plan, dict[str, Any]]:
        """Returns the plan of lctrain's memory policy, and its figures."""
        begin = time.perf_counter()
        plan = plan_for(self.model, config, tokens, self.precision)
        return plan, {
            "planned_policy": plan.policy,
            "backward_by_head": plan.by_head,
            "planned_gib": round(plan.tensor_bytes / GIB, 3),
            "planned_reserved_gib": round(plan.reserved_bytes / GIB, 3),
            "planned_host_gib": round(plan.host_bytes / GIB, 3),
            "planned_fits": plan.fits,
            "planned_longest": plan.longest,
            "planned_s": None if plan.seconds is None else round(plan.seconds, 2),
            "plan_s": round(time.perf_counter() - begin, 1),
            "layers": [f"{layer.inputs}/{layer.attention}" for layer in plan.policies],
        }

    def measured(
        self, config: MemoryConfig, tokens: int, plan: Plan | None, report: Report | None
    ) -> dict[str, Any]:
        """Runs training steps under a memory policy, and returns the measured figures.

        Args:
            config: Settings of the policy; a peer has the policies of transformers.
            tokens: Number of tokens of the pack.
            plan: Plan of the policy; None for a peer.
            report: Function for the progress of the timed steps, as in `LayerProgress`.

        Returns:
            A dictionary with `status`. Unless memory runs out, it also holds step_ms of every step,
            tokens_per_s, loss, host_gib and, on a GPU, peak_gib, reserved_gib and context_gib
            (what is in use on the GPU beside what the allocator reserves).
        """
        handle = None
        try:
            if plan is None:
                checkpoint_layers(self.inner, config.name)
            else:
                handle = apply_config(self.model, config, tokens, self.precision, chosen=plan)
            found = self._steps(tokens, report)
            store = None if handle is None else handle.store
            if self.contender.name == OURS:
                found["host_gib"] = 0.0 if store is None else round(store.capacity / GIB, 3)
                found["left_on_device"] = 0 if store is None else store.left_on_device
            return {"status": "ok", **found}
        except torch.OutOfMemoryError as error:
            return {"status": "out_of_memory", "reason": str(error).splitlines()[0][:200]}
        except Exception as error:  # of a peer; the other runs go on
            if self.contender.name == OURS:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return {"status": "error", "reason": reason}
        finally:
            if handle is not None:
                handle.remove()
            self.model.zero_grad(set_to_none=True)
            del handle
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _steps(self, tokens: int, report: Report | None) -> dict[str, Any]:
        device, model, steps = self.device, self.model, self.steps
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():  # every run begins with the same weights
            for parameter, value in zip(trained, self.initial, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        losses = []

        def make_step(count: int) -> Callable[[], None]:
            documents = min(steps.documents, count // 2)
            batch = random_pack([count // documents] * documents, self.shape).to(device)
            mixed = self.precision == "bf16-mixed"

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
                    if self.contender.name == OURS:
                        total, targets = causal_lm_loss(model, batch)
                    else:
                        total = self.inner(**self.contender.arguments(batch)).loss
                        targets = torch.ones((), device=device)
                total.backward()
                optimizer.step()
                losses.append(total.detach() / targets)

            return step

        begin = time.perf_counter()
        before = make_step(steps.warmup_tokens or tokens)
        for _ in range(steps.warmup):
            before()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            if steps.warmup_tokens is not None:  # blocks of short packs would fragment the memory
                torch.cuda.empty_cache()
        del before
        warmup_s = round(time.perf_counter() - begin, 1)
        if report is not None:
            print(f"warmed up in {warmup_s} s", flush=True)
        losses.clear()
        step = make_step(tokens)
        layers = checkpointed_layers(self.inner)
        with loaded_kernels() as loaded:
            timed = []
            for _ in range(steps.timed):
                with LayerProgress(layers, device, report) if report else nullcontext():
                    timed.append(time_step(step, device)[0])
        found = {
            "warmup_s": warmup_s,
            "step_ms": [round(milliseconds, 1) for milliseconds in timed],
            "tokens_per_s": round(1000 * tokens / median(timed), 1),
            "loss": round(float(losses[0]), 4),
            "kernels_loaded_in_steps": loaded,
        }
        if device.type == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 3)
            found["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 3)
            free, total = torch.cuda.mem_get_info(device)  # of the whole GPU
            context = total - free - torch.cuda.memory_reserved(device)
            found["context_gib"] = round(context / GIB, 3)
        return found
