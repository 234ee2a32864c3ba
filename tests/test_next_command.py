"""The next command of the closing report reads the text that the run held out, at its lengths."""

import shlex
from dataclasses import fields

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lctrain.composition import compose
from lctrain.config import EvalConfig, TrainConfig, to_dataclass
from lctrain.evaluate import name_the_model
from lctrain.next_command import NOT_OF_TEXTS, evaluation_arguments, pasteable
from tests.configs.composed import composed


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=first_run"],
        ["debug=fast"],
        [
            "data=text",
            "data.files=['my books/*, old=1.txt',/b/*.txt]",
            "data.held_out_fraction=0.01",
        ],
        ["data=jsonl", "data.files=[a.jsonl]", "data.field=doc.text", "evaluation.documents=null"],
        ["data=hub", "data.dataset=owner/name", "data.split='train[:10%]'"],
        [
            "data=chat",
            "data.files=[a.jsonl]",
            "+data.template_arguments={thinking:false,name:'a, b'}",
        ],
    ],
    ids=lambda overrides: overrides[0],
)
def test_the_arguments_name_the_text_of_the_run(overrides, tmp_path):
    run = to_dataclass(composed(*overrides, output_dir=tmp_path), TrainConfig)
    arguments = shlex.split(" ".join(evaluation_arguments(run)))
    given = name_the_model(["model=folder", *arguments, f"paths.output_dir={tmp_path}"])
    evaluated = to_dataclass(compose("eval", given), EvalConfig)
    assert type(evaluated.data) is type(run.data)
    names = {field.name for field in fields(run.data)} - NOT_OF_TEXTS
    assert {"held_out_fraction", "special_tokens"} <= names
    for name in names:
        assert getattr(evaluated.data, name) == getattr(run.data, name), name
    for name in ("documents", "document_tokens", "lengths"):
        assert getattr(evaluated, name) == getattr(run.evaluation, name), name


def test_the_default_text_needs_no_name(tmp_path):
    run = to_dataclass(composed(output_dir=tmp_path), TrainConfig)
    assert not [argument for argument in evaluation_arguments(run) if "data" in argument]


@pytest.mark.parametrize(
    "path",
    ["outputs/läuf 1/model", "größe/model", "a,b/c=d", "it's", 'say "x"', "back\\slash", "end\\"],
)
def test_a_printed_argument_reads_back_as_the_path(path):
    (argument,) = shlex.split(pasteable("model", path))
    override = OverridesParser.create().parse_override(argument)
    assert (override.key_or_group, override.value()) == ("model", path)


def test_plain_paths_stay_as_they_are():
    assert pasteable("model", "outputs/run_1/model") == "model=outputs/run_1/model"
