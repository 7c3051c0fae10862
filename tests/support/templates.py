"""Chat templates in the manner of many families of models, and conversations put together from their pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cpucache.layout import ChatTemplate
from cpucache.pml.tree import RoleName
from tests.support.tiny import CHATML

BOS, EOS = "<s>", "</s>"
Conversation = Sequence[tuple[RoleName, str]]

# The system text of a conversation that brings none, as Qwen's template has it.
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}{{ '' }}" + CHATML
)
# Each in the manner of a family of models.
DEFAULT_SYSTEM = (
    "{%- if messages[0].role == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
    "{%- else %}\n    {{- '<|im_start|>system\\nBe of use.<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {%- if message.role != 'system' and not message.tool_calls %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set lead = messages[0]['content'] + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{{ lead if loop.first else '' }}{{ m['content'] | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set text = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set text = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' + text + '<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\\n\\n' %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set first = '' %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}{%- for m in turns %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('alternate!') }}{%- endif %}{%- if m.role == 'user' %}"
    "{{- '[INST] ' + (first if loop.first else '') + m.content + '[/INST]' }}{%- else %}"
    "{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# Ends a conversation that is not to be gone on with by a token whose first half also opens the next role.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
TRIMS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role | upper + '] ' + m.content | trim }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n[ASSISTANT] ' }}{% endif %}"
)
INSTRUCTION = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}{% elif m.role == 'user' %}"
    "{{ '### Instruction:\\n' + m.content + '\\n\\n' }}{% else %}"
    "{{ '### Response:\\n' + m.content + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
# Marks what is trained on, asks for the date without checking, and for tools as if they were always there.
MODERN = (
    "{{ '<|system|>Today: ' + strftime_now('%Y-%m-%d') }}{% if tools is not none %}{{ tools[0].name }}{% endif %}"
    "{% if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% endif %}{{ '<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ '<|' + m.role + '|>' }}"
    "{% generation %}{{ m.content }}{{ '<|end|>' }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Shows an answer's reasoning only while it is the last message.
REASONING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<\uff5cUser\uff5c>' + m.content }}{% else %}{{ '<\uff5cAssistant\uff5c>' }}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "gemma": GEMMA,
    "llama 3": LLAMA3,
    "llama 2": LLAMA2,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "phi": PHI,
    "trims": TRIMS,
    "instruction": INSTRUCTION,
    "modern": MODERN,
    "reasoning": REASONING,
    "refuses": REFUSES,
    "drops system": DROPS_SYSTEM,
}
WITHOUT_SYSTEM = {"refuses", "drops system"}


def assembled(template: ChatTemplate, conversation: Conversation) -> str:
    text = ""
    previous: RoleName | None = None
    for role, content in conversation:
        text += template.start(role, previous=previous, first=not text) + content + template.end(role)
        previous = role
    return text + template.generation(previous)


class TrainedOn(jinja2.ext.Extension):
    """What ``{% generation %}`` means to who renders: nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def rendered(source: str, conversation: Conversation) -> str:
    """The text that the template renders for a conversation that the model is to answer."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", TrainedOn]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    return environment.from_string(source).render(
        messages=[{"role": role, "content": content} for role, content in conversation],
        add_generation_prompt=True,
        bos_token=BOS,
        eos_token=EOS,
        tools=None,
        raise_exception=refuse,
        strftime_now=lambda form: {"%d %b %Y": "26 Jul 2024", "%Y-%m-%d": "2024-07-26"}[form],
    )
