"""Tests that a run with another optimizer than AdamW resumes bit-exact."""

import pytest
import torch

from lctrain.config import OptimConfig
from lctrain.module import LongContextModule
from tests.training import loader, make_batch, make_trainer

UNEVEN = [make_batch([5, 9], 0), make_batch([40], 1), make_batch([2, 3, 4], 2)]


@pytest.mark.parametrize(
    "optim",
    [
        {"_target_": "torch.optim.SGD", "arguments": {"momentum": 0.9}},
        {"_target_": "torch.optim.Muon", "matrices_only": True},
        {"_target_": "lctrain.host_optimizer.HostAdamW"},
    ],
    ids=lambda optim: optim["_target_"],
)
def test_another_optimizer_resumes_bit_exact(optim, tmp_path, make_llama):
    config = OptimConfig(**optim, learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
    path = tmp_path / "x.ckpt"

    def fit(epochs, ckpt_path=None):
        module = LongContextModule(make_llama(), config)
        trainer = make_trainer(tmp_path, max_epochs=epochs, gradient_clip_val=1.0)
        trainer.fit(module, loader(UNEVEN), ckpt_path=ckpt_path, weights_only=False)
        trainer.save_checkpoint(path)
        return [parameter.detach().clone() for parameter in module.parameters()]

    begin = [parameter.detach() for parameter in make_llama().parameters()]
    whole = fit(2)
    half = fit(1)
    resumed = fit(2, path)
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))
    for earlier, later in ((begin, half), (half, whole)):
        assert not any(torch.equal(one, two) for one, two in zip(earlier, later, strict=True))
