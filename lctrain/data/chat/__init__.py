"""Conversations: read, rendered by a chat template, and tokenized with the tokens to train on."""

from lctrain.data.chat.source import ChatSource

__all__ = ["ChatSource"]
