"""Turns errors of Hydra and OmegaConf into messages that name the key, the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

_UNKNOWN_KEY = re.compile(r"Key '[^']+' (?:is )?not in ")
_NO_OVERRIDE = re.compile(r"Could not override '(?P<key>[^']+)'")
_NO_APPEND = re.compile(r"An item is already at '(?P<key>[^']+)'")
_NO_DELETE = re.compile(
    r"Could not delete from config\. (?:The value of )?'(?P<key>[^']+)' (?:does not exist|is )"
    r"|Error merging override ~(?P<kept>[^=\s]+).*\n?.* does not support deletion"
)
_NO_CHOICE = re.compile(r"Could not find '(?P<choice>[^']+)'(?P<rest>.*)", re.DOTALL)
_NO_GROUP = re.compile(r"Config group override must be a string or a list\. Got (?P<kind>\w+)")
_CONVERTED = re.compile(r"Value '(?P<value>.*?)' of type '\w+' could not be converted to (\w+)")
_NO_BOOLEAN = re.compile(r"Value '(?P<value>.*?)' is not a valid bool")
_NOT_A_LIST = re.compile(r"is not a ListConfig, list or tuple")
_NOT_A_STRING = re.compile(r"Cannot convert '\w+' to string: '(?P<value>.*)'")
_NOT_A_DICT = re.compile(
    r"Cannot assign (?P<kind>\w+) to Dict|Merge error: .* is not a subclass of"
)
_NO_NULL = re.compile(r"is not Optional")
_MISSING = re.compile(r"missing mandatory value|Missing mandatory value")
_NO_VALUE = re.compile(r"Error parsing override '(?P<override>[^']*)'\s*\n?missing EQUAL")
_RESOLVING = re.compile(
    r"ValueError raised while resolving interpolation: (?P<message>.* must .*, got .*)"
)
_KINDS = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}


Known = Callable[[], Iterable[str]]


def explain_config_error(
    error: BaseException, overrides: Sequence[str] = (), known: Known = tuple
) -> str:
    """Returns the message for an error of Hydra or OmegaConf: key, value and remedy.

    Args:
        error: Error of Hydra or OmegaConf.
        overrides: Overrides of the command line, from which the message quotes a value.
        known: Returns the dotted names of all keys. It is called for an unknown key, to suggest
            another one.
    """
    if type(error).__module__.partition(".")[0] == "yaml" or isinstance(error, UnicodeDecodeError):
        return _file_error(error)
    text = f"{error}\n{error.__cause__ or ''}"
    if match := _RESOLVING.search(text):
        return match["message"]  # the message of one of lctrain's own checks
    key = _full_key(text)
    given = _given(overrides)
    message = (
        _choice_error(text, given)
        or _key_error(text, key, given, known)
        or _value_error(text, key, given)
        or _syntax_error(text, overrides)
        or _place_error(text)
        or _target_error(error, text)
    )
    if message is not None:
        return message
    return "\n".join(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def _file_error(error: BaseException) -> str:
    """Returns the message about a configuration file that cannot be read."""
    if isinstance(error, UnicodeDecodeError):
        return (
            f"a configuration file must be UTF-8, got {_file_of(error) or 'one'} with the byte "
            f"0x{error.object[error.start]:02x} at {error.start}. Save it as UTF-8."
        )
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: "
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return (
        f"a configuration file must be YAML, got {where}{problem}. Check the indentation, which is "
        "made of spaces, and the brackets."
    )


def _file_of(error: BaseException) -> str | None:
    """Returns the file that Hydra was reading when it failed; None if it was reading none."""
    trace, found = error.__traceback__, None
    while trace is not None:
        found = trace.tb_frame.f_locals.get("full_path", found)
        trace = trace.tb_next
    return None if found is None else str(found)


def _target_error(error: BaseException, text: str) -> str | None:
    """Returns the message about a class that `_target_` names, or about the class's arguments."""
    if match := re.search(r"Error locating target '([^']+)'", text):
        return (
            f"_target_ must be a class that can be imported, got {match[1]!r}. Check the spelling; "
            "the folder of a file of your own belongs in PYTHONPATH."
        )
    if match := re.search(r"Error in call to target '([^']+)'", text):
        cause = " ".join(str(error.__cause__ or text.splitlines()[1]).split())
        return f"{match[1].rpartition('.')[2]}, which a _target_ names, cannot be built: {cause}"
    return None


def _place_error(text: str) -> str | None:
    """Returns the message about a wrong --config-dir or --config-name."""
    if match := re.search(r"Additional config directory '([^']+)' not found", text):
        return f"--config-dir must be a folder, got {match[1]}, which is not there. Check the path."
    if match := re.search(r"Cannot find primary config '([^']+)'", text):
        return (
            f"--config-name must be a file of --config-dir without its .yaml, got {match[1]!r}, "
            "which is not there. Leave it out for the configuration of lctrain."
        )
    if match := re.search(r"primary config '([^']+)' must be a DictConfig, got (\w+)", text):
        return f"{match[1]}.yaml must hold keys, got {match[2]}. --cfg job prints such a file."
    return None


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Returns the message about an unknown key, with the key that was probably meant.

    Args:
        key: Dotted name of the unknown key.
        known: Dotted names of all keys. Keys of choices that are not in use are prefixed, as in
            data=text:data.files.
    """
    names = list(known)
    homes = [name for name in names if name.endswith(f":{key}")]  # "data=text:data.files"
    near = _nearest(key, [name for name in names if ":" not in name])
    hint = f"Did you mean {near}?" if near else "--help lists the keys."
    if homes:
        hint = f"It belongs to {' and '.join(name.partition(':')[0] for name in homes)}."
    return f"{key} must be a key of the configuration, got one that it does not have. {hint}"


def _nearest(key: str, names: Sequence[str]) -> str | None:
    """Returns the key that was probably meant, by a similar spelling; None if there is none."""
    path, _, leaf = key.rpartition(".")
    siblings = [name for name in names if name.rpartition(".")[0] == path]
    for name in siblings:
        if name.rpartition(".")[2].startswith(leaf):
            return name
    if near := difflib.get_close_matches(key, names, n=1, cutoff=0.6):
        return near[0]
    leaves = {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)
    return leaves[near[0]] if near else None


def _choice_error(text: str, given: dict[str, str]) -> str | None:
    if match := _NO_GROUP.search(text):
        if nameless := next((f"={value}" for name, value in given.items() if not name), None):
            return _unreadable(nameless)
        named = [name for name, value in given.items() if "." not in name and _plain(value)]
        group = named[0] if named else "a group"
        return (
            f"{group} must be the name of one of its configurations, got {given.get(group)}. "
            f"--help lists them; single values are set as {group}.key=..."
        )
    match = _NO_CHOICE.search(text)
    if match is None:
        return None
    group, _, choice = match["choice"].rpartition("/")
    options = re.findall(r"^\s+(\S+)$", match["rest"], re.MULTILINE)
    options = [option for option in options if not option.endswith("_schema")]
    if not group or not options:
        return (
            f"{match['choice']} must be a configuration, got a name that is not there. --help "
            "lists them; --config-dir names a folder of your own."
        )
    near = difflib.get_close_matches(choice, options, n=1)
    hint = (
        f"Did you mean {group}={near[0]}?" if near else f"Write for example {group}={options[0]}."
    )
    return f"{group} must be one of {', '.join(options)}, got {choice!r}. {hint}"


def _key_error(text: str, key: str, given: dict[str, str], known: Known) -> str | None:
    if match := _NO_APPEND.search(text):
        return (
            f"{match['key']} must be set without a plus, got +{match['key']}, and it is a key "
            f"already. Write {match['key']}={given.get(match['key'], '...')}."
        )
    if match := _NO_DELETE.search(text):
        key = match["key"] or match["kept"]
        return f"{key} must not be taken out, got ~{key}. Leave that out."
    if _UNKNOWN_KEY.search(text) or _NO_OVERRIDE.search(text):
        return unknown_key(key, known())
    return None


def _value_error(text: str, key: str, given: dict[str, str]) -> str | None:
    value = given.get(key, "another")
    if _NOT_A_LIST.search(text):
        return f"{key} must be a list, got {value}. Write '{key}=[{value}]', with the quotes."
    if match := _CONVERTED.search(text):
        kind = _KINDS.get(match[2], f"of type {match[2]}")
        return f"{key} must be {kind}, got {match['value']!r}. Correct the value."
    if match := _NO_BOOLEAN.search(text):
        return f"{key} must be true or false, got {match['value']!r}. Write {key}=true."
    if match := _NOT_A_STRING.search(text):
        return (
            f"{key} must be a string, got {match['value']}. Quote it twice: "
            f"'{key}=\"{match['value'].strip('[]').replace(', ', ',')}\"'."
        )
    if _NOT_A_DICT.search(text):
        return f"{key} must hold keys, got {value}. Set them one by one: {key}.name=value."
    if _NO_NULL.search(text):
        return f"{key} must have a value, got null. Leave it out for the default."
    if _MISSING.search(text):
        return f"{key} must be given, got none. Set {key}=..."
    if match := re.search(r"Interpolation key '([^']+)' not found", text):
        return (
            f"{key} must refer to a key that there is, got ${{{match[1]}}}. Correct the reference."
        )
    return None


def _syntax_error(text: str, overrides: Sequence[str]) -> str | None:
    if "Unexpected type for root" in text:
        off = [o for o in overrides if o.endswith(("=none", "=null"))]
        if not off:
            return (
                "keys of a group that is switched off must not be set, got "
                f"{' '.join(overrides)}. Choose an option of the group first, as in adapter=lora."
            )
        return (
            f"keys of a group that is switched off must not be set, got {' '.join(off)} and "
            f"{' '.join(o for o in overrides if o not in off)}. Leave one of them out."
        )
    if match := _NO_VALUE.search(text):
        name = match["override"]
        return f"{name} must be followed by a value, got none. Write {name}=..."
    if "hydra.cc/docs/1.2/advanced/override_grammar" in text:
        shown = re.search(r"Error parsing override '([^']*)'", text)
        return _unreadable(shown[1] if shown else _first_unreadable(overrides))
    return None


def _first_unreadable(overrides: Sequence[str]) -> str:
    """Returns the first override that Hydra cannot parse alone; all of them if each one parses."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException:
            return override
    return " ".join(overrides)


def _unreadable(argument: str) -> str:
    """Returns the message about an argument that Hydra cannot parse."""
    remedy = (
        "Check the brackets and quotes; a value with spaces, commas or = needs quotes inside of "
        "those of the shell."
    )
    key, equals, value = argument.partition("=")
    if argument.endswith("\\r") or "\r" in argument:
        remedy = "It ends with a carriage return: save the script with the line ends of Unix."
    elif equals and not value.isascii():
        inside = value.strip("[]'\"")
        inside = f'["{inside}"]' if value.startswith("[") else f'"{inside}"'
        remedy = f"A value with such letters needs quotes inside of the shell's: '{key}={inside}'."
    return f"arguments must read key=value, got {argument!r}. {remedy}"


def _plain(value: str) -> bool:
    return value.lower() in ("null", "none", "true", "false") or value.lstrip("-").isdigit()


def _full_key(text: str) -> str:
    """Returns the dotted name of the key in an error's message; empty if it names none."""
    if found := re.findall(r"full_key: (\S+)", text):
        return str(found[-1])
    for pattern in (_NO_OVERRIDE, re.compile(r"Error merging override (?P<key>[^=\s]+)=")):
        if match := pattern.search(text):
            return match["key"]
    return ""


def _given(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the values of overrides by key, as text."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, equals, value in pairs if equals}
