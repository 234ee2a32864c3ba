"""Writes the table of encoders in docs/guides/encoders.md: what each does with padding.

    python -m tests.models.encoder_table

The verdicts are those of `patch_model` on tiny models with random weights.
"""

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lctrain.models import patch_model
from lctrain.models.encoder_layer import is_encoder_layer
from tests.models.tiny import tiny_model

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "encoders.md"
BEGIN = "<!-- encoders: begin (python -m tests.models.encoder_table) -->"
END = "<!-- encoders: end -->"
OUTSIDE = "unpad=True needs an encoder"
ENCODERS = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa",
    "camembert": "CamemBERT",
    "electra": "ELECTRA",
    "ernie": "ERNIE",
    "data2vec-text": "Data2Vec",
    "distilbert": "DistilBERT",
    "albert": "ALBERT",
    "modernbert": "ModernBERT",
    "nomic_bert": "Nomic BERT",
    "eurobert": "EuroBERT",
    "gte": "GTE",
    "jina_embeddings_v3": "Jina Embeddings v3",
    "xmod": "X-MOD",
    "mpnet": "MPNet",
    "deberta": "DeBERTa",
    "deberta-v2": "DeBERTa v2 and v3",
    "megatron-bert": "Megatron-BERT",
    "rembert": "RemBERT",
    "roformer": "RoFormer",
    "longformer": "Longformer",
    "big_bird": "BigBird",
    "nystromformer": "Nystromformer",
    "fnet": "FNet",
    "mobilebert": "MobileBERT",
    "convbert": "ConvBERT",
    "squeezebert": "SqueezeBERT",
    "layoutlm": "LayoutLM",
}
"""Model type -> title. Those that the installed transformers lacks have no row."""


def rows() -> dict[str, str]:
    """Returns the table's rows by title."""
    import transformers

    known = MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return {
        title: _row(title, family, getattr(transformers, known[family]))
        for family, title in ENCODERS.items()
        if family in known
    }


def _row(title: str, family: str, model_class: type) -> str:
    model = tiny_model(family, model_class)
    whole = any(is_encoder_layer(module) for module in model.modules())
    try:
        patch_model(model, unpad=True)
    except ValueError as error:
        verdict, whole = _verdict(str(error)), False
    else:
        verdict = "left out"
    return f"| {title} | {verdict} | {'yes' if whole else '-'} |"


def _verdict(message: str) -> str:
    if message.startswith(OUTSIDE):
        reason = message.partition(": ")[2].partition(". ")[0]
        return f"computed outside the attention: {reason}"
    return f"refused: {message.partition(', got')[0]}"


def table() -> str:
    """Returns the table between its marks."""
    head = ["| Encoder | Padding | One function per layer |", "|---|---|---|"]
    return "\n".join([BEGIN, "", *head, *rows().values(), "", END])


def main() -> None:
    """Writes the table into the guide."""
    text = GUIDE.read_text()
    GUIDE.write_text(text.partition(BEGIN)[0] + table() + text.partition(END)[2])


if __name__ == "__main__":
    main()
