"""RULER's synthetic tasks (arXiv 2404.06654), generated locally with any tokenizer."""
