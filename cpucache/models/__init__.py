"""Models: the catalogue, and the weights on this machine. ``cpucache.models.pull`` fetches weights."""

from cpucache.models.catalogue import Model, default_model, known_models
from cpucache.models.gguf_file import check_gguf
from cpucache.models.weights import models_dir, resolve_model

__all__ = ["Model", "check_gguf", "default_model", "known_models", "models_dir", "resolve_model"]
