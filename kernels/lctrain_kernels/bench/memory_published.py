"""published_table: context lengths that other projects have published, with their hardware."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A context length that another project has published.

    Attributes:
        source: Name of the project.
        training: Model, and what of it was trained.
        tokens: The length, as published.
        hardware: GPUs, and host memory if it was named.
        speed: Published speed; "-" if none.
    """

    source: str
    training: str
    tokens: str
    hardware: str
    speed: str = "-"


PUBLISHED = (
    Published("Unsloth", "Llama-3.1-8B, QLoRA of rank 32", "342,733", "80 GB"),
    Published("Unsloth", "gpt-oss-20B, QLoRA", "290k", "80 GB"),
    Published("Unsloth", "gpt-oss-20B, QLoRA, tiled MLP", "more than 500k", "80 GB"),
    Published("Unsloth", "gpt-oss-20B, QLoRA, tiled MLP", "750k", "192 GB"),
    Published("ALST (DeepSpeed)", "Llama-8B, all weights", "500k", "1 H100, 80 GB"),
    Published(
        "ALST (DeepSpeed)", "Llama-8B, all weights", "1.2M", "1 H200, about 1.9 TB of host memory"
    ),
    Published("TRL", "Qwen3-8B", "1M", "8 H100", "364 s a step, 360 tokens/s for each GPU"),
)


def published_table() -> str:
    """Returns a Markdown table of what others have published."""
    lines = [
        "Published by others, on their hardware and with their settings, and not measured here:",
        "",
        "| source | training | tokens | hardware | speed |",
        "|---|---|---|---|---|",
        *(
            f"| {one.source} | {one.training} | {one.tokens} | {one.hardware} | {one.speed} |"
            for one in PUBLISHED
        ),
    ]
    return "\n".join([*lines, ""])
