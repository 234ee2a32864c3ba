"""Tests that files of results are written by the one function that writes strict JSON."""

import ast

from tests.house.typecheck import ROOT

# What else makes JSON: hashes, texts of users, and messages between two of our processes.
OTHERS = {
    "kernels/lctrain_kernels/strict_json.py": "the function itself",
    "lctrain/bench/chat.py": "a text that is tokenized",
    "lctrain/bench/step.py": "a message to another process",
    "lctrain/bench/step_process.py": "a message to another process",
    "lctrain/data/chat/calls.py": "a text that a template writes",
    "lctrain/data/chat/conversation.py": "a text that is tokenized",
    "lctrain/data/chat/markers.py": "a text that is tokenized",
    "lctrain/data/chat/source.py": "a hash",
    "lctrain/data/prepared.py": "a hash",
    "lctrain/data/special_tokens.py": "the state of a tokenizer",
    "lctrain/eval/fingerprint.py": "a hash",
    "lctrain/failure.py": "the text of an error",
    "lctrain/run/identity.py": "options, which the file of a run holds as strict JSON",
    "lctrain/run/seal.py": "hashes of files",
    "recipes/post_training/conversations.py": "conversations",
}
CALLS = ("json.dump", "json.dumps")


def test_results_are_written_as_strict_json():
    found = set()
    for folder in ("lctrain", "kernels", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in CALLS:
                    found.add(str(path.relative_to(ROOT)))
    assert found - OTHERS.keys() == set(), "use lctrain_kernels.strict_json.write_json or to_json"
    assert OTHERS.keys() - found == set(), "these call json no longer: leave them out"
