"""Tests that every config composes, converts to plain dataclasses and builds its objects."""

import dataclasses
import importlib.util
import itertools
from importlib import resources

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import DictConfig, ListConfig, OmegaConf

from lctrain.attention import DualChunkSpec, FlashSpec, make_spec
from lctrain.build import (
    build_datamodule,
    build_trainer,
    instantiate_all,
    resolve_precision,
)
from lctrain.callbacks import NonFiniteLossGuard, StepBudget
from lctrain.command import expand_home
from lctrain.config import (
    STRATEGIES,
    TrainConfig,
    TrainerConfig,
    to_dataclass,
)
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.optim import build_optimizer, learning_rate_factor
from lctrain.schemas import register_schemas
from tests.configs.composed import composed, load

GROUPS = (
    "adapter",
    "attention",
    "callbacks",
    "data",
    "debug",
    "evaluation",
    "logger",
    "memory",
    "model",
    "optim",
)
NEEDED = {
    "data=text": ["data.files=[x.txt]"],
    "data=jsonl": ["data.files=[x.jsonl]"],
    "data=parquet": ["data.files=[x.parquet]"],
    "data=hub": ["data.dataset=owner/name"],
    "data=chat": ["data.files=[x.jsonl]", "data.tokenizer=owner/name"],
    "data=mix": ["data.sources=[{kind: stdlib, weight: 2}, {kind: packages, weight: 1}]"],
    "model=hf": ["model.name_or_path=owner/name"],
    "adapter=lora": ["model=hf", "model.name_or_path=owner/name"],
    "adapter=dora": ["model=hf", "model.name_or_path=owner/name"],
    "experiment=post_training_sft": ["model.name_or_path=owner/name"],
    "experiment=post_training_dpo": ["model.name_or_path=owner/name"],
    "experiment=post_training_grpo": ["model.name_or_path=owner/name"],
    "callbacks=attention_schedule": ["callbacks.attention_schedule.stages={0:{attention:flash}}"],
    "callbacks=length_schedule": ["callbacks.length_schedule.stages={0:512}"],
    "callbacks=best_checkpoint": ["trainer.validate_every_n_steps=5"],
    "callbacks=early_stopping": ["trainer.validate_every_n_steps=5"],
}


def choices():
    """Yields "group=option" for every YAML file in the package."""
    for group in (*GROUPS, "paths", "trainer"):
        for file in (resources.files("lctrain.configs") / group).iterdir():
            if file.name.endswith(".yaml"):
                yield f"{group}={file.name.removesuffix('.yaml')}"
    for file in (resources.files("lctrain.recipes") / "experiment").iterdir():
        yield f"experiment={file.name.removesuffix('.yaml')}"


CHOICES = sorted(choices())


def no_omegaconf(value) -> bool:
    """Returns whether the tree holds no OmegaConf container."""
    if isinstance(value, (DictConfig, ListConfig)):
        return False
    if dataclasses.is_dataclass(value):
        return all(no_omegaconf(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, dict):
        return all(map(no_omegaconf, itertools.chain(value.keys(), value.values())))
    return not isinstance(value, (list, tuple)) or all(map(no_omegaconf, value))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_config_composes_and_builds(choice, tmp_path):
    config = load(choice, *NEEDED.get(choice, []), output_dir=tmp_path)
    assert no_omegaconf(config)
    datamodule = build_datamodule(config.data)
    assert datamodule.max_tokens == config.data.max_tokens
    callbacks = instantiate_all("callbacks", config.callbacks)
    loggers = instantiate_all("logger", config.logger)
    trainer_config = dataclasses.replace(config.trainer, accelerator="cpu", devices="1")
    trainer = build_trainer(
        trainer_config, list(callbacks.values()), list(loggers.values()), str(tmp_path)
    )
    assert trainer.max_steps == config.trainer.max_steps
    assert learning_rate_factor(config.optim, 1000)(999) <= 1.0


def test_schemas_are_registered_once_in_a_store(monkeypatch):
    """Storing them takes longer than composing a configuration."""
    composed()
    store = ConfigStore.instance().repo
    before = dict(store)
    composed()
    assert all(store[name] is stored for name, stored in before.items())
    monkeypatch.setattr(ConfigStore.instance(), "repo", {"hydra": before["hydra"]})
    assert composed("experiment=first_run").trainer.max_steps


def test_a_run_may_end_by_time(tmp_path):
    config = load("trainer=cpu", "trainer.max_time='00:00:01:30'")
    trainer = build_trainer(config.trainer, [], [], str(tmp_path))
    (timer,) = [c for c in trainer.callbacks if isinstance(c, pl.callbacks.Timer)]
    assert timer.time_remaining() == 90


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("nam=x", "nam"),
        ("optim.lr=1e-3", "optim.lr"),
        ("data.max_token=5", "data.max_token"),
        ("data.files=[x]", "data.files"),
        ("trainer.max_step=5", "trainer.max_step"),
        ("callbacks.throughput.tokens=5", "callbacks.throughput.tokens"),
        ("callbacks.throughputs.max_tokens=5", "callbacks.throughputs"),
        ("logger.csv.dir=x", "logger.csv.dir"),
        ("paths.out=x", "paths.out"),
        ("evaluation.length=[1]", "evaluation.length"),
        ("attention.kind=flash", "attention.kind"),
        ("model.hidden_size=32", "model.hidden_size"),
    ],
)
def test_unknown_keys_are_named(override, named):
    with pytest.raises(ConfigCompositionException, match=f"Could not override '{named}"):
        composed(override)


@pytest.mark.parametrize(
    "override",
    [
        "optim.learning_rate=fast",
        "data.max_tokens=4k",
        "trainer.max_steps=1.5",
        "trainer.deterministic=perhaps",
        "callbacks.checkpoint.every_n_steps=often",
        "evaluation.lengths=[a]",
        "seed=x",
    ],
)
def test_wrong_types_are_named(override):
    key, value = override.split("=")
    with pytest.raises(ConfigCompositionException) as error:
        composed(override)
    assert key in str(error.value)
    assert value.strip("[]") in str(error.value.__cause__)


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("fsdp", "FSDP1 hides the parameters"),
        ("deepspeed_stage_2", "DeepSpeed runs a backward of its own"),
        ("model_parallel", "tensor and expert parallelism are not supported"),
        ("ddp_spawn", "Use fsdp2"),
    ],
)
def test_strategies_that_would_train_wrongly(strategy, reason):
    with pytest.raises(ValueError, match=rf"strategy must be .* got '{strategy}'. {reason}"):
        load(f"trainer.strategy={strategy}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.replicas=2"], "trainer.replicas must be 1 with trainer.strategy=auto, got 2"),
        (["trainer.strategy=fsdp2", "trainer.replicas=0"], "trainer.replicas must be at least 1"),
        (["trainer.strategy=fsdp2", "optim=muon"], "optim.matrices_only must be false with"),
        (["trainer.strategy=fsdp2", "optim=adamw_host"], "optim must not be adamw_host with tr"),
        (
            [
                *("trainer.strategy=fsdp2", "trainer.precision=bf16-mixed"),
                *("memory=offload", "memory.mlp_tokens=8"),
            ],
            "memory.mlp_tokens must be null with trainer.strategy=fsdp2 in bf16-mixed, got 8",
        ),
        (
            ["trainer.strategy=fsdp2", "trainer.replicas=3", "trainer.devices=8"],
            "trainer.replicas must divide the number of ranks, got 3 and 8 ranks",
        ),
        (
            ["trainer.strategy=fsdp2", "trainer.replicas=2", "trainer.devices='0,2,3'"],
            "trainer.replicas must divide the number of ranks, got 2 and 3 ranks",
        ),
        (["trainer.context_parallel=2"], "trainer.context_parallel must be 1 with trainer.str"),
        (["trainer.strategy=fsdp2", "trainer.context_parallel=0"], "context_parallel must be at l"),
        (["trainer.context_exchange=ring"], "trainer.context_exchange must be one of auto, heads"),
        (
            ["trainer.strategy=fsdp2", "trainer.context_parallel=3", "trainer.devices=4"],
            "must divide the number of ranks per replica, got 3 and 4 ranks",
        ),
        (
            [
                *("trainer.strategy=fsdp2", "trainer.devices=4", "trainer.replicas=2"),
                "trainer.context_parallel=4",
            ],
            "must divide the number of ranks per replica, got 4 and 2 ranks",
        ),
        (
            [
                *("trainer.strategy=fsdp2", "trainer.devices=4", "trainer.num_nodes=3"),
                "trainer.context_parallel=6",
            ],
            "must divide the 4 ranks of a machine, or be a multiple of them, got 6",
        ),
        (
            [
                *("trainer.strategy=fsdp2", "trainer.devices=2", "trainer.context_parallel=2"),
                "attention=none",
            ],
            "attention must be flash, dual_chunk or differential with trainer.context_parallel=2",
        ),
        (
            [
                *("trainer.strategy=fsdp2", "trainer.devices=2", "trainer.context_parallel=2"),
                "task=mlm",
            ],
            "trainer.context_parallel must be 1 with task=mlm, got 2",
        ),
        (
            [
                *("trainer.strategy=fsdp2", "model=hf", "model.name_or_path=a"),
                *("adapter=lora", "adapter.quantize=nf4"),
            ],
            "adapter.quantize must be null with trainer.strategy=fsdp2, got nf4",
        ),
    ],
)
def test_settings_that_do_not_fit_the_strategy(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(*overrides)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_that_lightning_builds(strategy, tmp_path):
    config = load("trainer=cpu", f"trainer.strategy={strategy}")
    trainer = build_trainer(config.trainer, [], [], str(tmp_path))
    kinds = ShardedStrategy if strategy == "fsdp2" else (SingleDeviceStrategy, DDPStrategy)
    assert isinstance(trainer.strategy, kinds)


def test_keys_appended_to_a_schema_are_named():
    with pytest.raises(ValueError, match=r"speed must be a key of the configuration"):
        load("+optim.speed=3")


def test_missing_values_are_named():
    with pytest.raises(ValueError, match=r"model.name_or_path must be given, got none"):
        load("model=hf")


def test_unknown_choice_lists_what_there_is():
    with pytest.raises(Exception, match="llama_100m_32k"):
        composed("experiment=none_such")


def test_null_switches_a_callback_off():
    callbacks = instantiate_all("callbacks", load("callbacks.isolation=null").callbacks)
    assert "isolation" not in callbacks
    assert "throughput" in callbacks


def test_a_callback_of_ones_own():
    config = load("+callbacks.mine={_target_: lightning.pytorch.callbacks.LambdaCallback}")
    assert isinstance(instantiate_all("callbacks", config.callbacks)["mine"], pl.Callback)


def test_an_entry_without_target():
    with pytest.raises(ValueError, match=r"callbacks.mine must have a _target_"):
        instantiate_all("callbacks", load("+callbacks.mine={rate: 1}").callbacks)


def test_options_reach_the_spec_of_their_kind():
    options = ["chunk_size=95", "local_size=8", "scale=yarn", "scale_coefficient=0.05", "window=96"]
    overrides = [f"attention.{option}" for option in options]
    attention = load("attention=dual_chunk", *overrides).attention
    spec = make_spec(attention.name, **attention.options())
    assert spec == DualChunkSpec(
        chunk_size=95, local_size=8, scale="yarn", scale_coefficient=0.05, window=96
    )
    flash = load("attention=flash", "attention.dropout=0.1").attention
    assert make_spec(flash.name, **flash.options()) == FlashSpec(dropout=0.1)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (NonFiniteLossGuard, r"one NonFiniteLossGuard, got 2\. Remove the others\.$"),
        (
            lambda: StepBudget(9.0),
            r"one StepBudget, got 2\. Remove .* or trainer.budget_s",
        ),
    ],
    ids=["guard", "budget"],
)
def test_callbacks_with_a_state_are_given_once(tmp_path, make, remedy):
    """Lightning would save their states under the same key."""
    with pytest.raises(ValueError, match=remedy):
        build_trainer(load().trainer, [make(), make()], [], str(tmp_path))


def test_an_optimizer_is_chosen_by_its_class():
    muon = load("optim=muon", "+optim.arguments.momentum=0.9").optim
    assert (muon._target_, muon.matrices_only) == ("torch.optim.Muon", True)
    assert muon.arguments == {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.9}
    sgd = load("optim._target_=torch.optim.SGD", "+optim.arguments={nesterov: true, momentum: 0.9}")
    optimizer = build_optimizer(torch.nn.Linear(2, 2), sgd.optim)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["nesterov"]


def test_a_run_without_end(tmp_path):
    with pytest.raises(ValueError, match=r"max_steps or trainer.max_epochs must be set"):
        build_trainer(TrainerConfig(), [], [], str(tmp_path))


def test_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_precision(TrainerConfig(max_steps=1)) == "bf16-mixed"
    assert resolve_precision(TrainerConfig(max_steps=1, accelerator="cpu")) == "32-true"
    assert resolve_precision(TrainerConfig(max_steps=1, precision="bf16-true")) == "bf16-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision(TrainerConfig(max_steps=1)) == "32-true"


def test_composed_config_is_yaml(tmp_path):
    text = OmegaConf.to_yaml(composed("paths.root=/r"), resolve=True)
    assert "runs_dir: /r/default" in text


def test_what_to_do_about_faults_and_encodings_is_in_the_schema():
    data = load("data=jsonl", "data.files=[x]", "data.on_error=raise", "data.encoding=latin-1").data
    assert (data.on_error, data.encoding) == ("raise", "latin-1")
    with pytest.raises(ValueError, match="on_error must be one of skip, raise"):
        load("data=stdlib", "data.on_error=never")


def test_a_leading_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/people/me")
    config = load(
        "model=hf", "model.name_or_path='~/model'", "paths.root='~/runs'", "ckpt_path='~/a.ckpt'",
        "data=hub", "data.dataset='~/data'", "data.cache_dir='~/cache'", "logger=wandb",
        output_dir="'~/out'",
    )  # fmt: skip
    assert config.model.name_or_path == "/people/me/model"
    assert config.paths.root == "/people/me/runs"
    assert config.paths.runs_dir == "/people/me/runs/default"
    assert config.paths.output_dir == "/people/me/out"
    assert config.ckpt_path == "/people/me/a.ckpt"
    assert config.data.dataset == "/people/me/data"
    assert config.callbacks["checkpoint"].directory == "/people/me/out/checkpoints"
    assert {logger.save_dir for logger in config.logger.values()} == {"/people/me/out"}
    monkeypatch.setattr("lctrain.build.tokenizer_for", lambda model, named: None)
    cache_dir = build_datamodule(config.data, config.model).preparation.cache_dir
    assert str(cache_dir) == "/people/me/cache"


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_leading_tilde_is_the_home_folder_where_hydra_writes(name, monkeypatch):
    monkeypatch.setenv("HOME", "/people/me")
    register_schemas()
    with initialize_config_module("lctrain.configs", version_base="1.3"):
        config = compose(name, ["paths.root='~/runs'"], return_hydra_config=True)
    assert config.hydra.run.dir.startswith("/people/me/runs/")
    assert config.hydra.sweep.dir.startswith("/people/me/runs/")


def test_a_tilde_in_the_arguments_of_a_command_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/people/me")
    arguments = ["paths.root=~/x", "data.files=[~/a,~/b/*.txt]", "~data.seed", "a=b~/c", "c=~x/y"]
    assert expand_home(arguments) == [
        "paths.root=/people/me/x", "data.files=[/people/me/a,/people/me/b/*.txt]", "~data.seed",
        "a=b~/c", "c=~x/y",
    ]  # fmt: skip


def test_callbacks_are_choices_that_add_up():
    """callbacks=[default,...] adds Lightning's own callbacks to the default ones."""
    several = "callbacks=[default,best_checkpoint,early_stopping]"
    metric = "callbacks.early_stopping.monitor=train/loss"
    plain = to_dataclass(
        composed(several, metric, "callbacks.best_checkpoint.mode=max"), TrainConfig
    )
    made = instantiate_all("callbacks", plain.callbacks)
    assert {"isolation", "checkpoint", "best_checkpoint", "early_stopping"} <= made.keys()
    assert made["early_stopping"].monitor == "train/loss"
    assert made["best_checkpoint"].mode == "max"
    callbacks = list(made.values())
    with pytest.raises(ValueError, match=r"validate_every_n_steps must be set for ModelCheckpoint"):
        build_trainer(plain.trainer, callbacks, [], "out")


def test_a_schedule_of_attention_from_overrides():
    stages = "callbacks.attention_schedule.stages={0:{attention:flash,sliding_window:64},5:{}}"
    several = "callbacks=[default,attention_schedule]"
    plain = to_dataclass(composed(several, "attention=none", stages), TrainConfig)
    schedule = instantiate_all("callbacks", plain.callbacks)["attention_schedule"]
    assert [(stage.step, dict(stage.options)) for stage in schedule.stages] == [
        (0, {"sliding_window": 64}),
        (5, {}),
    ]


def test_a_schedule_of_lengths_from_overrides():
    stages = "callbacks.length_schedule.stages={0:512,10:1024}"
    tokens = "callbacks.length_schedule.learning_rate=tokens"
    plain = to_dataclass(
        composed("callbacks=[default,length_schedule]", stages, tokens), TrainConfig
    )
    schedule = instantiate_all("callbacks", plain.callbacks)["length_schedule"]
    assert schedule.length_stages.steps == (0, 10)
    assert schedule.length_stages.lengths == (512, 1024)
    assert schedule.learning_rate == "tokens"


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import tensorboard

    plain = to_dataclass(composed("logger=tensorboard", output_dir=tmp_path), TrainConfig)
    if importlib.util.find_spec("tensorboard") is not None:
        logger = instantiate_all("logger", plain.logger)["tensorboard"]
        logger.log_metrics({"x": 1.0}, step=0)
        logger.finalize("success")
        assert list((tmp_path / "tensorboard").glob("events*"))
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
        monkeypatch.setattr(tensorboard, name, False, raising=False)
    with pytest.raises(Exception, match=r"Install lctrain\[tensorboard\]"):
        instantiate_all("logger", plain.logger)
