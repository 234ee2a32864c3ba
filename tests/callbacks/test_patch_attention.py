"""Tests PatchAttention: it patches the models of any module for a run, then restores them."""

import inspect
import logging
from dataclasses import fields

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lctrain.attention import AttentionSpec, DualChunkSpec, FlashSpec, is_patched
from lctrain.callbacks import IsolationCheck, PatchAttention, StepCheckpoint, ThroughputMonitor
from lctrain.config import OptimConfig
from lctrain.models import find_models, patch_model, patch_models
from lctrain.module import LongContextModule
from tests.callbacks.own_module import OwnModule, implementation
from tests.numerics import assert_equal_in_float64, near
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([12, 5], 0), make_batch([30], 1), make_batch([7, 8, 9], 2)]


class Built(OwnModule):
    """A module that builds its model in `configure_model` or `setup`."""

    def __init__(self, make, hook):
        super().__init__(None)
        self.make, self.hook = make, hook

    def setup(self, stage):
        if self.hook == "setup" and self.model is None:
            self.model = self.make()

    def configure_model(self):
        if self.hook == "configure_model" and self.model is None:
            self.model = self.make()


class Pair(OwnModule):
    """A module with two models; the second is frozen, in a list of modules."""

    def __init__(self, model, other):
        super().__init__(model)
        self.others = torch.nn.ModuleList([other.requires_grad_(False)])

    def training_step(self, batch, batch_idx):
        self.implementations.append((implementation(self.model), implementation(self.others[0])))
        return self.loss_of(batch)


def outputs(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize("run", ["fit", "validate", "test", "predict"])
def test_patches_for_the_run_and_gives_back(tmp_path, make_llama, run):
    model = make_llama()
    before, names = outputs(model), list(model.state_dict())
    module = OwnModule(model, learning_rate=0.0)
    trainer = make_trainer(tmp_path, [PatchAttention()], max_steps=2)
    getattr(trainer, run)(module, loader(PACKS))
    assert set(module.implementations) == {"lctrain_flash"}
    assert implementation(model) == "sdpa"
    assert torch.equal(outputs(model), before)
    assert list(model.state_dict()) == names
    assert "configure_model" not in vars(module)
    assert not model._forward_pre_hooks


def test_a_module_that_shards_in_configure_model(tmp_path, make_llama):
    """PatchAttention patches the sharded model; one shard gives the losses of the whole model."""

    def make():
        return make_llama().double()

    whole = OwnModule(make())
    make_trainer(tmp_path, [PatchAttention()]).fit(whole, loader(PACKS))

    class Sharded(Built):
        def configure_model(self):
            if self.model is None:
                self.model = self.make()
                mesh = init_device_mesh("cpu", (1,))
                for layer in self.model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.model, mesh=mesh)

    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        sharded = Sharded(make, "configure_model")
        make_trainer(tmp_path, [PatchAttention()]).fit(sharded, loader(PACKS))
    finally:
        dist.destroy_process_group()
    assert sharded.seen == near(whole.seen)
    assert set(sharded.implementations) == {"lctrain_flash"}
    assert implementation(sharded.model) == "sdpa"
    weights = whole.model.state_dict()
    for name, weight in sharded.model.state_dict().items():
        assert_equal_in_float64(weight.to_local(), weights[name], name)


def test_the_losses_are_those_of_a_patched_model(tmp_path, make_llama):
    """An unpatched model mixes the documents of a pack, so its losses differ."""
    patched = OwnModule(make_llama())
    patch_model(patched.model, fused=True)
    make_trainer(tmp_path).fit(patched, loader(PACKS))
    called = OwnModule(make_llama())
    make_trainer(tmp_path, [PatchAttention()]).fit(called, loader(PACKS))
    assert called.seen == patched.seen


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_models_that_are_built_late(tmp_path, make_llama, hook):
    module = Built(make_llama, hook)
    make_trainer(tmp_path, [PatchAttention()], max_steps=1).fit(module, loader(PACKS))
    assert module.implementations == ["lctrain_flash"]
    assert not is_patched(module.model)


@pytest.mark.parametrize("late", [False, True], ids=["model", "function"])
def test_long_context_module_leaves_the_patch_to_the_callback(tmp_path, make_llama, late):
    callback = PatchAttention("dual_chunk", chunk_size=16)
    model = make_llama()
    module = LongContextModule((lambda data: model) if late else model, OptimConfig())
    seen = []
    module.on_train_batch_end = lambda *a: seen.append(implementation(module.model))
    make_trainer(tmp_path, [callback], max_steps=1).fit(module, loader(PACKS))
    assert seen == ["lctrain_dual_chunk"]
    assert module.patch_handle is None
    assert module.attention.name == "flash"
    assert not is_patched(model)


def test_a_trainer_is_reused(tmp_path, make_llama):
    callback = PatchAttention()
    trainer = make_trainer(tmp_path, [callback], max_steps=1)
    module, other = OwnModule(make_llama()), OwnModule(make_llama())
    trainer.fit(module, loader(PACKS))
    trainer.validate(module, loader(PACKS), verbose=False)
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 9, 2
    trainer.fit(module, loader(PACKS))
    trainer.test(other, loader(PACKS), verbose=False)
    assert len(module.implementations) == 1 + len(PACKS) + 1
    assert set(module.implementations + other.implementations) == {"lctrain_flash"}
    assert not is_patched(module.model)
    assert not is_patched(other.model)


class BreakError(Exception):
    """An error that the tests raise to make a run fail."""


@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_train_start", "setup"])
def test_a_run_that_fails_gives_back(tmp_path, make_llama, where):
    module = OwnModule(make_llama())

    def fail(*args, **kwargs):
        raise BreakError

    setattr(module, where, fail)
    trainer = make_trainer(tmp_path, [PatchAttention()], num_sanity_val_steps=1)
    with pytest.raises(BreakError):
        trainer.fit(module, loader(PACKS), loader(PACKS))
    assert not is_patched(module.model)
    assert "configure_model" not in vars(module)


def test_all_models_or_named_ones(tmp_path, make_llama):
    both = Pair(make_llama(), make_llama(seed=1))
    make_trainer(tmp_path, [PatchAttention()], max_steps=1).fit(both, loader(PACKS))
    assert both.implementations == [("lctrain_flash", "lctrain_flash")]
    one = Pair(make_llama(), make_llama(seed=1))
    two = [
        PatchAttention("dual_chunk", models="model"),
        PatchAttention(models=["others.0"]),
    ]
    make_trainer(tmp_path, two, max_steps=1).fit(one, loader(PACKS))
    assert one.implementations == [("lctrain_dual_chunk", "lctrain_flash")]


def test_a_hidden_model_by_its_path(make_llama):
    module = OwnModule(make_llama())
    module.hidden = {"teacher": [make_llama()]}
    assert list(find_models(module)) == ["model"]
    assert list(find_models(module, "hidden.teacher.0")) == ["hidden.teacher.0"]


class Untouched(pl.LightningDataModule):
    """A dataset that fails when it is read."""

    def prepare_data(self):
        raise AssertionError("data were prepared")

    setup = train_dataloader = prepare_data


def unsupported():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    return GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global"], 1]]))


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (lambda m: OwnModule(torch.nn.Linear(2, 2)), [{}], r"needs a transformers model, got none"),
        (lambda m: OwnModule(unsupported()), [{}], r"AttentionInterface.*choose a model"),
        (
            lambda m: Pair(m(), unsupported()),
            [{}],
            r"must fit all models of Pair, got 'others.0'.*Name the models.*models='model'",
        ),
        (
            lambda m: OwnModule(m()),
            [{"models": "policy.model"}],
            r"got 'policy.model', which does not exist. It holds transformers models at 'model'",
        ),
        (lambda m: OwnModule(m()), [{"models": "model.model.layers.0"}], "which holds none"),
        (lambda m: OwnModule(m()), [{}, {}], r"callbacks must patch a model once.*Remove one"),
        (lambda m: OwnModule(patch_model(m()).model), [{}], r"must not be patched.*unpatch\(\)"),
    ],
    ids=["none", "unsupported", "two-needs", "no-path", "no-model-there", "twice", "patched"],
)
def test_errors_come_before_data_are_read(tmp_path, make_llama, module, callbacks, message):
    own = module(make_llama)
    handles = [model for model in find_models(own).values() if is_patched(model)]
    trainer = make_trainer(tmp_path, [PatchAttention(**options) for options in callbacks])
    with pytest.raises(ValueError, match=message):
        trainer.fit(own, datamodule=Untouched())
    left = [model for model in find_models(own).values() if is_patched(model)]
    assert left == handles


def test_a_module_that_builds_no_model(tmp_path):
    module = Built(lambda: torch.nn.Linear(2, 2), "configure_model")
    with pytest.raises(ValueError, match="needs a transformers model, got none in Built"):
        make_trainer(tmp_path, [PatchAttention()]).fit(module, loader(PACKS))


def test_a_wrapped_model_is_refused(tmp_path, make_llama, monkeypatch):
    class Wrapper(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, model):
            torch.nn.Module.__init__(self)
            self.module = model

    module = OwnModule(torch.nn.ModuleList([Wrapper(make_llama())]))
    with pytest.raises(ValueError, match=r"must not be wrapped, got a Wrapper at 'model\.0'"):
        make_trainer(tmp_path, [PatchAttention()]).fit(module, datamodule=Untouched())


def test_wrong_options_are_refused_at_once():
    with pytest.raises(ValueError, match="belongs to attention='dual_chunk'"):
        PatchAttention("flash", chunk_size=4)
    with pytest.raises(TypeError, match="chunk_sise"):
        PatchAttention("flash", chunk_sise=4)
    with pytest.raises(ValueError, match="sliding_window must be an int of at least 1, got 0"):
        PatchAttention(sliding_window=0)


def test_every_option_of_a_spec_is_a_parameter():
    """YAML can set only the parameters that the signature names."""
    parameters = inspect.signature(PatchAttention).parameters
    named = inspect.signature(patch_model).parameters
    assert set(named) - {"model", "options"} <= set(parameters)
    for spec in (AttentionSpec, FlashSpec, DualChunkSpec):
        assert {field.name for field in fields(spec)} <= set(parameters)


def test_it_says_once_what_it_swapped(tmp_path, make_llama, caplog):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, [PatchAttention()], logger=logger, max_steps=1)
    with caplog.at_level(logging.INFO, logger="lctrain"):
        trainer.fit(OwnModule(make_llama()), loader(PACKS), loader(PACKS))
    said = [record.message for record in caplog.records if "swapped" in record.message]
    assert len(said) == 1
    assert "sdpa -> lctrain_flash" in said[0]
    assert "kernels: pytorch" in said[0]
    assert "lctrain_flash" in (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()


def test_checkpoints_do_not_notice(tmp_path, make_llama):
    states = []
    for callbacks in ([], [PatchAttention()]):
        module = OwnModule(make_llama())
        trainer = make_trainer(tmp_path, callbacks, max_steps=1)
        trainer.fit(module, loader([make_batch([30], 1)]))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        states.append(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()


@pytest.mark.parametrize(("compiled", "fused"), [("model", True), ("module", False)])
def test_compiled_models(tmp_path, make_llama, compiled, fused):
    """A compiled model is patched after its first run, and later unpatched.

    The backend runs the same operators, unless fused modules leave some of them to a compiler.
    """

    def make():
        return make_llama(num_hidden_layers=1).to(torch.float64 if fused else torch.float32)

    patch, packs = PatchAttention(fused=fused), PACKS[:2]
    plain = OwnModule(make())
    make_trainer(tmp_path, [patch]).fit(plain, loader(packs))
    torch._dynamo.reset()
    module = OwnModule(make())
    inner = module.model
    before = outputs(inner)
    if compiled == "model":
        module.model = torch.compile(inner, backend="eager")
        outputs(module.model)
    else:
        module = torch.compile(module, backend="eager")
    make_trainer(tmp_path, [patch]).fit(module, loader(packs))
    own = getattr(module, "_orig_mod", module)
    assert own.seen == (near(plain.seen) if fused else plain.seen)
    assert set(own.implementations) == {"lctrain_flash"}
    assert not is_patched(inner)
    inner.load_state_dict(make().state_dict())
    assert torch.equal(outputs(own.model), before)


def test_peft_models(tmp_path, make_llama):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    module = OwnModule(peft.get_peft_model(make_llama(), config))
    make_trainer(tmp_path, [PatchAttention()], max_steps=2).fit(module, loader(PACKS))
    assert module.implementations == ["lctrain_flash"] * 2
    assert implementation(module.model) == "sdpa"


def test_beside_the_other_callbacks_in_any_order(tmp_path, make_llama):
    losses = []
    for order in (1, -1):
        callbacks = [
            PatchAttention(),
            IsolationCheck(),
            ThroughputMonitor(),
            StepCheckpoint(tmp_path / f"{order}", every_n_steps=1),
        ][::order]
        module = OwnModule(make_llama())
        trainer = make_trainer(tmp_path, callbacks, max_steps=2, enable_checkpointing=True)
        trainer.fit(module, loader(PACKS))
        losses.append(module.seen)
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("in_float64")
def test_a_plain_function_for_fabric(make_llama):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model = make_llama()
    before = outputs(model)
    wrapped = fabric.setup(model)
    with patch_models(wrapped, "flash") as patches:
        assert "sdpa -> lctrain_flash" in repr(patches)
        with torch.no_grad():
            packed = wrapped(**PACKS[0].model_kwargs()).logits[0, :12]
            alone = model(input_ids=PACKS[0].input_ids[:, :12]).logits[0]
        assert_equal_in_float64(packed, alone)
    assert torch.equal(outputs(model), before)
    with pytest.raises(ValueError, match="must hold a transformers model, got none"):
        patch_models(torch.nn.Linear(2, 2))


def test_patch_models_patches_all_or_none(make_llama):
    pair = Pair(make_llama(), unsupported())
    with pytest.raises(ValueError, match=r"got 'others.0', which cannot.*models='model'"):
        patch_models(pair)
    assert not is_patched(pair.model)


def test_fused_operations_and_the_loss_come_and_go(tmp_path, make_llama, caplog):
    module = OwnModule(make_llama())
    kinds = [type(part) for part in module.model.modules()]
    patch = PatchAttention(fused=True, loss=True)
    with caplog.at_level(logging.INFO, logger="lctrain"):
        make_trainer(tmp_path, [patch], max_steps=1).fit(module, loader(PACKS))
    assert "fused: no" not in caplog.text
    assert [type(part) for part in module.model.modules()] == kinds
