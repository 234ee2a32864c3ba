"""Runs the commands on bad input, with torch, Lightning, transformers and datasets blocked.

    python -m tests.run_bad_input some|others

Runs every eighteenth case of bad_input.txt, or the others. Prints JSON: the cases whose output
differs from their message, and the number of lines of every message.

For `some`, Hydra composes each configuration twice, as it does for a user: first it reads
`hydra.mode`. For `others`, it composes once, from files that are read once.
"""

import contextlib
import copy
import io
import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path

HEAVY = ("torch", "lightning", "transformers", "datasets")
EVERY = 18
LINES = (Path(__file__).parent / "bad_input.txt").read_text().splitlines()
CASES = [tuple(part.strip() for part in line.split(" | ")) for line in LINES[1:]]


class Refused:
    """An import finder that finds heavy packages but raises an error when one is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name not in HEAVY:
            return None
        spec = PathFinder.find_spec(name, path)
        spec.loader = self
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise AssertionError(f"{module.__name__} was loaded")


def prepare():
    """Writes the files that the cases name into the current folder."""
    Path("FILE").touch()
    Path("LOOP").symlink_to("LOOP")
    Path("bad.yaml").write_text("defaults:\n  - train\n - _self_\n")
    Path("tab.yaml").write_text("defaults:\n\t- train\n")
    Path("latin.yaml").write_bytes("name: h\u00e9llo\n".encode("latin-1"))
    Path("list.yaml").write_text("- 1\n- 2\n")
    keys = "defaults:\r\n  - train\r\n  - _self_\r\n\r\ntrainer:\r\n  max_stepz: 3\r\n"
    Path("crlf.yaml").write_bytes(keys.encode())


def run(main, program, arguments):
    """Returns a command's exit status and its lines on stderr."""
    arguments = arguments.replace("\\r", "\r").split(" ; ")
    sys.argv = [program, *filter(None, arguments)]
    errors = io.StringIO()
    status = 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            status = stop.code
    return status, errors.getvalue().splitlines()


def cases(part):
    """Returns the cases of a part, "some" or "others"; together they are all cases."""
    return [case for number, case in enumerate(CASES) if (number % EVERY == 0) == (part == "some")]


def compose_quickly():
    """Lets Hydra compose once, and read and copy once what is the same in every case.

    - Hydra takes the mode from the options only, as it does if it cannot compose.
    - lctrain's YAML files are read once; a case gets a copy.
    - The store of schemas is not copied: it gives copies itself.
    """
    from hydra._internal.core_plugins.importlib_resources_config_source import (
        ImportlibResourcesConfigSource,
    )
    from hydra._internal.hydra import Hydra
    from hydra.core.config_store import ConfigStore

    assert not any("hydra.mode" in arguments for _, arguments, _ in CASES)
    Hydra.get_mode = lambda hydra, config_name, overrides: None
    ConfigStore.__deepcopy__ = lambda store, copies: store
    read, files = ImportlibResourcesConfigSource.load_config, {}

    def load(source, config_path):
        key = source.path, source.provider, config_path
        if key not in files:
            files[key] = read(source, config_path)
        return copy.deepcopy(files[key])

    ImportlibResourcesConfigSource.load_config = load


def check(part):
    """Returns the failed cases, and the message lines of every case."""
    sys.meta_path.insert(0, Refused())
    from lctrain import evaluate, train

    if part == "others":
        compose_quickly()

    mains = {"lctrain-train": train.main, "lctrain-eval": evaluate.main}
    prepare()
    wrong, lengths = [], []
    for program, arguments, message in cases(part):
        status, printed = run(mains[program], program, arguments)
        lengths.append(len(printed))
        if status != 2 or not printed or not printed[0].startswith(f"{program}: {message}"):
            wrong.append([arguments, status, printed[-1:] if status == 1 else printed[:1]])
    return {"wrong": wrong, "lines": lengths}


if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1])))
