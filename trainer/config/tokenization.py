"""Keys of tokenization."""

from __future__ import annotations

from pydantic import Field

from trainer.config.section import Plugin


class Tokenization(Plugin):
    tokenizer: str = Field(description="`bytes`, or the path of a Hugging Face `tokenizer.json`.")
    # With defaults, unlike most others: sections of earlier runs do not have them.
    separator: str | None = Field(
        default=None,
        description="The token that ends each document, such as `<|im_end|>`; part of what the run is. null: the "
        "`eos_token` of the `tokenizer_config.json` beside the tokenizer, or else a usual one that it has "
        "(`<|endoftext|>`, `</s>`, ...).",
    )
    special_tokens: bool = Field(
        default=False,
        description="Special tokens that texts spell out, such as `<|im_start|>` in chats, are taken as tokens; false: "
        "as any other text. The separator is text in any case. Part of what the run is.",
    )
