"""Builds the API reference: one page per public package, with an entry for every public name.

The packages are read, not imported, so that the site is built on a machine without a GPU.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SYMBOLS = """Shapes use these symbols: T packed tokens, N documents, H query heads, Hk key/value
heads, D head dim, Dv head dim of the values, V vocabulary size, E hidden size.
"""


def packages() -> list[str]:
    """Returns the names of `lctrain` and of its packages that list public names in `__all__`."""
    files = [ROOT / "lctrain" / "__init__.py", *sorted((ROOT / "lctrain").glob("*/__init__.py"))]
    names = [".".join(file.parent.relative_to(ROOT).parts) for file in files]
    return [name for name in names if public_names(name)]


def pages() -> dict[str, str]:
    """Returns the page of every public package, by the name of the package."""
    return {name: f"reference/api/{name}.md" for name in packages()}


def public_names(package: str) -> list[str]:
    """Returns the names in `__all__` of a package; none if it has no such list."""
    for node in _tree(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def api_page(package: str) -> str:
    """Returns the page of a package as Markdown, with an mkdocstrings entry for every name."""
    summary = ast.get_docstring(_tree(package)) or ""
    parts = [f"# {package}", summary.splitlines()[0], SYMBOLS]
    for name in public_names(package):
        home = definition(package, name)
        if home in packages():
            parts.append(f"## {name}\n\nA package: see [{home}]({home}.md).")
            continue
        options = f"    options:\n      heading: {name}\n      toc_label: {name}"
        parts.append(f"::: {home}\n{options}")
    return "\n\n".join([*parts, ""])


def definition(module: str, name: str) -> str:
    """Returns the dotted path of the definition behind a name, through all re-exports.

    Args:
        module: Dotted name of the module from which a user imports the name.
        name: The public name.
    """
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name) and node.module != module:
                    return definition(node.module, alias.name)
    return f"{module}.{name}"


def _tree(module: str) -> ast.Module:
    parts = module.split(".")
    folder = ROOT / "kernels" if parts[0] == "lctrain_kernels" else ROOT
    path = folder.joinpath(*parts)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())
