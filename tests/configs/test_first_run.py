"""Tests the settings that `make train` needs for its picture to show an effect."""

from lctrain.config import TrainConfig, to_dataclass
from lctrain.limits import DUAL_CHUNK_METHODS
from tests.configs.composed import composed


def test_the_first_run_reads_eight_windows_and_ends_in_time(tmp_path):
    config = to_dataclass(composed("experiment=first_run", output_dir=tmp_path), TrainConfig)
    window = config.model.config["max_position_embeddings"]
    evaluation = config.evaluation
    assert config.data.max_document_tokens == window
    assert max(evaluation.lengths) == 8 * window
    assert window in evaluation.lengths  # what the ratio beyond it refers to
    assert min(evaluation.lengths) * 8 <= window  # room for a gain inside it
    assert evaluation.methods[0] == "plain"
    assert set(evaluation.methods) & set(DUAL_CHUNK_METHODS)
    assert evaluation.document_tokens > max(evaluation.lengths) + evaluation.stride
    assert evaluation.documents > 2  # a standard error is one over documents
    assert evaluation.passkey_model == "shipped"
    assert max(evaluation.passkey_lengths) >= 8 * 128  # the window of that model
    # 300 CPU-seconds in all: two cores until training ends, and the evaluation
    assert config.trainer.budget_s <= 110
    assert config.trainer.max_steps > 0
    assert config.optim.warmup_steps is None  # a share, so that a shorter run is possible


def test_a_shorter_first_run_is_possible(tmp_path):
    short = composed("experiment=first_run", "trainer.max_steps=2", output_dir=tmp_path)
    assert to_dataclass(short, TrainConfig).trainer.max_steps == 2
