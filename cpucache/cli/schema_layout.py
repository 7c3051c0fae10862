"""Schemas laid out for a model, and their slices in the store, for the commands that show them."""

from __future__ import annotations

from functools import cached_property

from cpucache.layout import ChatTemplate, Positions, SchemaLayout
from cpucache.models import resolve_model
from cpucache.pml.tree import Schema
from cpucache.runtime import Model
from cpucache.store import Fingerprints, Row, Store, default_home


class Looked:
    """A model of which only the vocabulary is loaded, and its slices in the store."""

    def __init__(self, name: str, positions: Positions) -> None:
        self.model = Model(resolve_model(name), vocab_only=True)
        self._positions = positions

    def lay(self, schema: Schema) -> SchemaLayout:
        """Returns the layout of a schema. Raises ``PMLError``."""
        model = self.model
        template = ChatTemplate(model.chat_template, bos=model.special_text("bos"), eos=model.special_text("eos"))
        return SchemaLayout(schema, model, template, self._positions)

    @cached_property
    def stored(self) -> tuple[list[Row], float | None]:
        """Returns the slices of the model in the store, and the tokens per second at which they were evaluated.

        A store that does not exist is not created.
        """
        home = default_home()
        if (home / "index.sqlite").is_file():
            fingerprint = Fingerprints(home / "index.sqlite").of(self.model.path)
            with Store(home, ram_budget=0) as store:
                if store.index is not None:
                    rows = [row for row in store.index.rows() if row.info.fingerprint == fingerprint]
                    return rows, store.speed(fingerprint)
        return [], None

    @cached_property
    def bytes_of_a_token(self) -> int:
        """Bytes of a token's keys and values as f16; 0 if the layers of the model differ.

        Only the metadata of the file is read.
        """
        model = self.model

        def number(name: str) -> int:
            text = model.meta(f"{model.architecture}.{name}") or ""
            return int(text) if text.isdecimal() else 0

        heads = number("attention.head_count")
        size = number("embedding_length") // heads if heads else 0
        key = number("attention.key_length") or size
        value = number("attention.value_length") or size
        return number("block_count") * (number("attention.head_count_kv") or heads) * (key + value) * 2
