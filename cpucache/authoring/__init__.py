"""Schemas from Python functions, Jinja templates, files, and recorded requests."""

from cpucache.authoring.decorator import AnyPromptFunction, PromptFunction, PromptMethod, PromptText, prompt
from cpucache.authoring.function import MaxTokens
from cpucache.authoring.roles import assistant, system, user

__all__ = [
    "AnyPromptFunction",
    "MaxTokens",
    "PromptFunction",
    "PromptMethod",
    "PromptText",
    "assistant",
    "prompt",
    "system",
    "user",
]
