"""The guide's table of encoders is what `patch_model` says."""

from tests.models.encoder_table import BEGIN, ENCODERS, END, GUIDE, rows


def test_the_guide_has_the_verdict_of_every_encoder():
    written = GUIDE.read_text().partition(BEGIN)[2].partition(END)[0]
    found = {line.split(" | ")[0][2:]: line for line in written.splitlines() if line[:2] == "| "}
    del found["Encoder"]
    assert set(found) <= set(ENCODERS.values())
    for title, row in rows().items():
        assert found[title] == row
