"""Checks names of model families and of their arguments against transformers' source files.

Importing a configuration class takes seconds, since it imports torch. A name that occurs nowhere in
the files which define the class is certainly misspelt. A name that occurs there may still be wrong;
`lctrain.build` checks it against the class later.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

from lctrain.limits import require

_WORD = re.compile(r"[A-Za-z_]\w*")
_OTHER_FAMILY = re.compile(r"from \.\.(\w+)\.configuration_\w+ import")
_DOWNLOAD = re.compile(r"/models--(?:([\w.-]+?)--)?([\w.-]+)/snapshots/[^/]+/?$")
_SHARED = ("configuration_utils.py", "modeling_rope_utils.py")


def check_family(model_type: str, name: str = "model.model_type") -> None:
    """Raises ValueError if transformers has no model family of this name.

    Args:
        model_type: Name of the family, such as "llama".
        name: Name of the option, for the message.
    """
    known = families()
    if known and model_type not in known:
        raise unknown_family(model_type, known, name)


def check_arguments(model_type: str, given: Iterable[str]) -> None:
    """Raises ValueError if a name cannot be an argument of the family's configuration class.

    Args:
        model_type: Name of a model family of transformers.
        given: Names of the arguments.
    """
    words = _words_of_family(model_type)
    for key in given:
        if words and key not in words:
            raise unknown_argument(key, f"the configuration of {model_type}", words)


def check_model_name(name: str) -> None:
    """Raises ValueError if the name of a model is empty, or is a path that is not a folder."""
    require(
        name.strip() != "",
        f"model must be a folder or a name on the Hugging Face hub, got {name!r}. Set "
        "model.name_or_path.",
    )
    require(
        not looks_like_path(name) or Path(name).expanduser().is_dir(),
        f"model must be a folder or a name on the Hugging Face hub, got {name}, which does not "
        "exist. lctrain-train writes the folder `model` into that of its run.",
    )


def check_tokenizer_name(name: str | None) -> None:
    """Raises ValueError if the name of a tokenizer is a path that does not exist."""
    require(
        name is None or not looks_like_path(name) or Path(name).expanduser().exists(),
        f"data.tokenizer must be a folder or a name on the Hugging Face hub, got {name}, which "
        "does not exist. null trains one, or takes that of a pretrained model.",
    )


def resolved_name(name: str) -> str:
    """Returns a folder as an absolute path, which holds from any folder; other names unchanged.

    Args:
        name: Name of a model, as transformers takes it: a folder, or a name on the hub.
    """
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def public_name(name: str) -> str:
    """Returns a model's name on the hub; "" for a folder of this machine.

    The folder of a download is that of its name.

    Args:
        name: Name of a model, as transformers takes it: a folder, or a name on the hub.
    """
    downloaded = _DOWNLOAD.search(name.replace("\\", "/"))
    if downloaded:
        return "/".join(filter(None, downloaded.groups()))
    return "" if looks_like_path(name) or Path(name).is_dir() else name


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path; names on the hub are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def unknown_family(model_type: str, known: Collection[str], name: str) -> ValueError:
    """Returns the error for an unknown model family.

    Args:
        model_type: The unknown name.
        known: Names of all families, for a suggestion.
        name: Name of the option, for the message.
    """
    near = difflib.get_close_matches(model_type, known, n=1)
    remedy = f"Did you mean {near[0]}?" if near else "Use for example llama, qwen3 or mistral."
    return ValueError(f"{name} must be a family of transformers, got {model_type!r}. {remedy}")


def unknown_argument(key: str, owner: str, known: Collection[str]) -> ValueError:
    """Returns the error for an argument that a configuration class does not have.

    Args:
        key: Name of the argument.
        owner: Name of the class, for the message.
        known: Names of all arguments, for a suggestion.
    """
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    remedy = f"Did you mean model.config.{near[0]}?" if near else "Check the spelling."
    return ValueError(
        f"model.config.{key} must be an argument of {owner}, which has none of that name. {remedy}"
    )


@cache
def families() -> frozenset[str]:
    """Returns the names of all model families in transformers' files; empty if none is found."""
    found: set[str] = set()
    folder = _transformers()
    for path in () if folder is None else (folder / "models" / "auto").glob("*.py"):
        if path.name in ("auto_mappings.py", "configuration_auto.py"):
            found |= set(re.findall(r'"([\w.-]+)",?:? ?\n? *"\w+Config"', path.read_text()))
    return frozenset(found)


@cache
def _words_of_family(model_type: str) -> frozenset[str]:
    """Returns all words in the source files of a family's configuration; {} without files."""
    folder = _transformers()
    own = None if folder is None else folder / "models" / model_type.replace("-", "_")
    if folder is None or own is None or not any(own.glob("configuration_*.py")):
        return frozenset()
    files = [folder / name for name in _SHARED if (folder / name).is_file()]
    waiting, seen = [own], {own}
    while waiting:
        for path in waiting.pop().glob("configuration_*.py"):
            files.append(path)
            for family in _OTHER_FAMILY.findall(path.read_text()):
                other = folder / "models" / family
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
    return frozenset(word for path in files for word in _WORD.findall(path.read_text()))


def _transformers() -> Path | None:
    """Returns the folder of transformers without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("transformers")
    places = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(places))) if places else None
