"""Tests which documents are held out."""

from lctrain.data import TextSource
from lctrain.data.tokenizer import END_TOKEN


def test_one_long_file_leaves_something_to_hold_out(make_data, tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(f"line {number}" for number in range(400)))
    module = make_data(source=TextSource(files=str(tmp_path / "book.txt")), held_out_fraction=0.1)
    module.setup()
    (document,) = module.held_out_documents()
    assert module.tokenizer.decode(document.input_ids).endswith(f"line 399{END_TOKEN}")
    held_out, train = module.held_out_report.tokens, module.packing_report.tokens
    assert 0.05 < held_out / (held_out + train) < 0.15


def test_files_on_both_sides_are_counted_in_a_warning(make_data, corpus, caplog):
    source = TextSource(files=f"{corpus}/*.txt", held_out_files=f"{corpus}/0*.txt")
    make_data(source=source).setup()
    assert "10 of 10 held-out documents are in the training data, too" in caplog.text
