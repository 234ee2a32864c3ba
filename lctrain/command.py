"""Command: runs a console script with Hydra, and prints its help and its errors."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import hydra

from lctrain.composition import CONFIGS, known_keys
from lctrain.failure import FULL_ERROR, report_failure
from lctrain.help import Interface, describe, pasteable
from lctrain.run.new_folder import begin_command
from lctrain.warn import begin_warnings

HELP = frozenset({"--help", "-h"})
CFG = frozenset({"--cfg", "-c"})
OTHER_FILES = frozenset({"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"})

_HOME = re.compile(r"(?<=[=\[,])~(?=[/,\]]|$)")


class Command(Interface):
    """A console script that runs a function with the configuration that Hydra composes."""

    def run(self, task: Callable[[Any], None]) -> None:
        """Runs the command with the arguments of sys.argv.

        Args:
            task: Function that is called with the composed configuration.

        Raises:
            SystemExit: after an error. The status is 2 for an expected error, such as a wrong
                option, and 1 for a bug. With HYDRA_FULL_ERROR=1 the error itself is raised.
        """
        begin_command()
        begin_warnings()
        sys.argv[1:] = arguments = options_first(expand_home(sys.argv[1:]))
        if (show := self._shown(arguments)) is not None:
            self._guard(lambda: print(show(self, overrides_of(arguments)).rstrip()))
        elif os.environ.get(FULL_ERROR) == "1":
            self._hydra(task)()
        else:
            os.environ[FULL_ERROR] = "1"  # Hydra then raises errors instead of printing them
            self._guard(self._hydra(self._guarded(task)))
            os.environ.pop(FULL_ERROR, None)

    @staticmethod
    def _shown(arguments: Sequence[str]) -> Callable[[Interface, Sequence[str]], str] | None:
        """Returns the function that makes the text of --help or --cfg job; None for a run."""
        if HELP & set(arguments):
            return describe
        if OTHER_FILES & {argument.partition("=")[0] for argument in arguments}:
            return None  # Hydra prints the configuration if it comes from the user's own files
        pairs = itertools.pairwise(arguments)
        if "--cfg=job" in arguments or any(f in CFG and value == "job" for f, value in pairs):
            return pasteable
        return None

    def _hydra(self, task: Callable[[Any], None]) -> Callable[[], Any]:
        decorate = hydra.main(
            version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name=self.config_name
        )
        decorated: Callable[[], Any] = decorate(task)
        return decorated

    def _guarded(self, task: Callable[[Any], None]) -> Callable[[Any], None]:
        """Returns a function that runs the task and reports its errors before Hydra can."""

        @wraps(task)
        def guarded(config: Any) -> None:
            os.environ.pop(FULL_ERROR, None)  # processes of other ranks must not inherit it
            self._guard(lambda: task(config))

        return guarded

    def _guard(self, function: Callable[[], Any]) -> None:
        try:
            function()
        except Exception as error:
            os.environ.pop(FULL_ERROR, None)
            overrides = overrides_of(sys.argv[1:])
            known = partial(known_keys, self.config_name, overrides)
            raise SystemExit(report_failure(self.program, error, overrides, known)) from None


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Replaces `~` at the beginning of values, since Hydra's grammar does not allow the character.

    Shells do not expand it in arguments such as `paths.root=~/x`, or inside lists.
    """
    home = os.path.expanduser("~")
    return [_HOME.sub(lambda _: home, argument) for argument in arguments]


def options_first(arguments: Sequence[str]) -> list[str]:
    """Moves options such as --multirun before the overrides; Hydra accepts none between them."""
    overrides, options = _separate(arguments)
    return [*options, *overrides]


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of the form key=value or ~key, without options and their values."""
    return _separate(arguments)[0]


def _separate(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the overrides (arguments key=value or ~key), and the options with their values."""
    overrides: list[str] = []
    options: list[str] = []
    takes_value = {*CFG, *OTHER_FILES, "--package", "-p", "--info", "-i", "--experimental-rerun"}
    value_follows = False
    for argument in arguments:
        option = value_follows or argument.startswith("-")
        (options if option else overrides).append(argument)
        value_follows = not value_follows and argument in takes_value
    return overrides, options
