"""Hooks of mkdocs: they add the generated pages to the site."""

from __future__ import annotations

from builders import api, configuration, tested
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the pages of the Python API in the navigation: one for every public package."""
    for section in config.nav or []:
        for entry in section.get("Reference", []):
            if "Python API" in entry:
                entry["Python API"] = [{name: page} for name, page in api.pages().items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the references of the configuration and the API, and what was compiled and run."""
    generated = {configuration.PAGE: configuration.configuration_page()}
    generated[tested.PAGE] = tested.tested_page()
    generated |= {page: api.api_page(name) for name, page in api.pages().items()}
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    return files
