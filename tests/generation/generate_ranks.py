"""Generates in the middle of training on two ranks; test_sharded.py runs `main` on each."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lctrain
from lctrain.batch import PackedBatch
from lctrain.config import AttentionConfig, MemoryConfig, OptimConfig
from lctrain.distributed.gather import gathered_bytes, sharded_modules
from lctrain.distributed.sharding import through_root, whole_value
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.generation import whole_weights
from lctrain.loss import causal_lm_loss, token_log_probs
from lctrain.module import LongContextModule
from lctrain.recipes.post_training import grpo
from lctrain.recipes.post_training.dpo import Dpo
from lctrain.recipes.post_training.grpo import Grpo
from lctrain.recipes.post_training.passkeys import Questions
from lctrain.recipes.post_training.scale import SCALES
from tests.distributed.ranks import join
from tests.float64 import built_in_float64
from tests.train_two_ranks import CLIP, WINDOW, Recorder, make_model
from tests.training import loader, make_trainer

PROMPTS = [[[5, 6, 7], [8] * 70, [5, 6, 7]], [[9, 10]]]  # by rank
NEW_TOKENS = [6, 2]


def complete(model, rank, **options):
    """Returns the completions of a rank's prompts."""
    return lctrain.generate(
        model, PROMPTS[rank], max_new_tokens=NEW_TOKENS[rank], eos_token_id=[], **options
    )


class Rollouts(Recorder):
    """A Recorder that generates before a forward pass, inside the root, and after a step."""

    def __init__(self, make):
        super().__init__(make)
        self.found = []

    def _generate(self, model):
        """Generates, and notes the completions beside those of a whole copy of the model."""
        rank, states = dist.get_rank(), torch.get_rng_state()
        found = complete(model, rank)
        assert torch.equal(torch.get_rng_state(), states)
        assert lctrain.generate(model, [] if rank == 0 else [[3]], max_new_tokens=1) is not None
        whole = make_model()
        weights = {name: whole_value(p.data) for name, p in self.model.named_parameters()}
        whole.load_state_dict(weights)
        lctrain.patch_model(whole, **self.attention.options(), fused=self.attention.fused)
        self.found.append((found, complete(whole, rank)))

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:  # FSDP2 has not seen a forward pass yet
            self._generate(self.model)
            self.sharded = all(isinstance(p.data, DTensor) for p in self.model.parameters())
            through_root(self.trainer, self._generate, self.model)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._generate(self)


def fit(folder, kind, strategy):
    """Trains one epoch on both ranks, and returns the module."""
    module = kind(make_model())
    make_trainer(
        folder,
        strategy=strategy,
        devices=2,
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=CLIP,
    ).fit(module)
    return module


SETTINGS = SimpleNamespace(
    optim=OptimConfig(), attention=AttentionConfig(fused=False), memory=MemoryConfig(), seed=0
)


def random_ids(rank, *size):
    """Returns two tensors of token ids, other ones on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(3, 97, size, generator=generator) for _ in range(2)]


class Losses(LongContextModule):
    """Notes the loss of each step, and trains with plain SGD."""

    def configure_optimizers(self):
        self.losses = []
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(self.last_loss))


class Policy(Losses, Grpo):
    """The recipe's GRPO on random questions."""

    def train_dataloader(self):
        rows = random_ids(self.global_rank, 2, 70)
        return DataLoader([Questions(one[:, :-3], one[:, -3:]) for one in rows], batch_size=None)


class Preference(Losses, Dpo):
    """The recipe's DPO on random pairs."""

    def train_dataloader(self):
        rows = random_ids(self.global_rank, 30)
        return loader(
            [PackedBatch.from_groups([(row[:20], [row[20:24], row[24:]])]) for row in rows]
        )


def losses_of(folder, kind, strategy):
    """Returns the losses of GRPO or DPO on both ranks."""
    # Rewards that differ within a group whatever is drawn.
    grpo.rewards = lambda given, answers: torch.arange(len(given)).double()
    with built_in_float64():
        module = kind(make_model(), SETTINGS, replace(SCALES["tiny"], samples=4))
        make_trainer(folder, strategy=strategy, devices=2).fit(module)
    return module.losses


class Outer(nn.Module):
    """A module around a model, with a parameter of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.ones(4))


def sharded_by_hand(outer=False, alone=()):
    """Returns a patched model that fully_shard divides, or a module around it, and its copy.

    Args:
        outer: Whether to divide a module around the model.
        alone: Names of modules that are a group of their own, beside the layers.
    """
    model = make_model()
    lctrain.patch_model(model)
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.model.layers, *map(model.get_submodule, alone)):
        fully_shard(layer, mesh=mesh)
    found = Outer(model) if outer else model
    return fully_shard(found, mesh=mesh), whole


def error_of(function, *arguments, **options):
    """Returns type and message of the error that a call raises."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def by_hand(rank):
    """Returns what generation on models of fully_shard gives this rank."""
    model, whole = sharded_by_hand()
    outer, _ = sharded_by_hand(outer=True)
    found = {"completions": (complete(model, rank), complete(whole, rank))}
    found["outer"] = (complete(outer, rank), complete(whole, rank))
    found["padded"] = (complete(model, rank, batching="padded"), complete(whole, rank))
    found["part"] = error_of(complete, outer.model, rank)
    found["bytes"] = gathered_bytes(sharded_modules(model))
    options = {"temperature": -1.0} if rank else {}
    found["argument"] = error_of(complete, model, rank, **options)
    free, whole_weights.free_bytes = whole_weights.free_bytes, lambda _: None if rank else 2**16
    found["memory"] = error_of(complete, model, rank)
    whole_weights.free_bytes = free
    row = model.model.embed_tokens if rank == 0 else None
    if row is not None:
        row.weight.data.to_local()[9] = float("nan")  # rank 0 holds the row, rank 1 reads it
    options = {"max_new_tokens": 1, "eos_token_id": []}
    found["nan"] = error_of(lctrain.generate, model, PROMPTS[rank], **options)
    found["sharded"] = all(isinstance(p.data, DTensor) for p in model.parameters())
    if row is not None:
        row.weight.data.to_local()[9] = 0.0
    found["after"] = error_of(complete, model, rank)
    return found


def losses_by_hand(rank):
    """Returns losses and gradients of models of fully_shard, beside those of a whole model."""
    with built_in_float64():
        model, whole = sharded_by_hand()
        outer, _ = sharded_by_hand(outer=True)
        apart, _ = sharded_by_hand(alone=("lm_head",))
    ids = random_ids(rank, 20)[0]
    pack = PackedBatch.from_groups([(ids[:8], [ids[8:14], ids[14:]])])
    plain = PackedBatch.from_documents([ids[:12], ids[12:]])
    found = {}

    def log_probs(model):
        result = token_log_probs(model, pack, temperature=0.7, entropy=True)
        return result.log_probs, result.entropy

    for name, loss in (
        ("log_probs", log_probs),
        ("loss", lambda model: (causal_lm_loss(model, plain)[0],)),
    ):
        with torch.no_grad():
            values = [loss(one) for one in (model, whole)]
        kept = all(isinstance(p, DTensor) for p in model.parameters())
        gradients = []
        for one in (model, whole):
            one.zero_grad()
            loss(one)[0].sum().backward()
            gradients.append([whole_value(p.grad) for p in one.parameters()])
        for gradient in gradients[1]:
            dist.all_reduce(gradient)
        mean = [gradient / dist.get_world_size() for gradient in gradients[1]]
        found[name] = (values, kept, gradients[0], mean)
        found[name, "outer"] = error_of(loss, outer.model)
        found[name, "apart"] = error_of(loss, apart)
    return found


def main() -> None:
    """Trains and generates, and writes the results of both ranks."""
    rank, size, folder, _ = join()
    mine = {"by_hand": by_hand(rank), "losses_by_hand": losses_by_hand(rank)}
    for name, strategy in (("fsdp2", ShardedStrategy), ("ddp", lambda: "ddp")):
        plain, rollouts = (fit(folder, kind, strategy()) for kind in (Recorder, Rollouts))
        mine[name] = {
            "records": (plain.records, rollouts.records),
            "completions": rollouts.found,
            "sharded": rollouts.sharded,
            "grpo": losses_of(folder, Policy, strategy()),
            "dpo": losses_of(folder, Preference, strategy()),
        }
    found = [None] * size
    dist.all_gather_object(found, mine)
    if rank == 0:
        torch.save(found, folder / "found.pt")
