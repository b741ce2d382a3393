"""Small chat templates with the features of well-known families', and a tokenizer that has their special tokens.

They are written for these tests. Each shows one family's way: who may speak, where the system's text goes, which turns
are rewritten, what ends a turn, and which filters, tags and variables the template uses.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from data_owner_client.plm.tokenizer import PlmTokenizer
from harness.tiny_models import tiny_tokenizer
from plm_owner_server.engines.model_files.tokenizer import bundle_tokenizer

NOVEMBER = datetime.date(2026, 11, 27)
"""The day of templates that read the clock."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Find out if it's > 0 °C & <dry>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
DOCUMENTS = [{"title": "Terms", "text": "A lamp is a light."}]


@dataclass(frozen=True)
class Family:
    """A chat template and how conversations use it.

    Attributes:
        template: Jinja source, or sources by name.
        end: what ends an assistant's turn; for GLM-4, the beginning of the user's next one.
        special: further special tokens.
        added: further added tokens that are not special.
        takes_system: whether it renders a system turn.
        arguments: arguments with which a target can follow its prompt.
        tools: tools that it is rendered with.
        strips: whether it takes away space around contents.
        moves_system: whether the system's text moves once the assistant's turn is there.
    """

    template: str | dict[str, str]
    end: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    takes_system: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    strips: bool = False
    moves_system: bool = False

    def transformers_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer as its owner has it."""
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)})
        tokenizer.add_tokens(list(self.added))
        tokenizer.chat_template = self.template
        return tokenizer

    def tokenizer(self) -> PlmTokenizer:
        """The tokenizer as a client has it."""
        return PlmTokenizer(bundle_tokenizer(self.transformers_tokenizer()))


_CHATML = """
{%- macro turn(role, content) -%}
{{ '<|im_start|>' ~ role ~ '\n' ~ content ~ '<|im_end|>\n' }}
{%- endmacro -%}
{%- for m in messages -%}{{ turn(m.role, m.content) }}{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""

_LLAMA2 = """
{%- set first = 1 if messages[0].role == 'system' else 0 -%}
{%- for m in messages[first:] -%}
    {%- if loop.index0 % 2 != (0 if m.role == 'user' else 1) -%}
        {{ raise_exception('User and assistant must take turns.') }}
    {%- endif -%}
    {%- if m.role == 'user' -%}
        {%- set text = m.content -%}
        {%- if loop.first and first -%}
            {%- set text = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' + text -%}
        {%- endif -%}
        {{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + m.content.strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

_LLAMA3 = """
{{- bos_token }}
{%- if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}
    {{- 'You have: ' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}
{%- endif %}
{{- 'Today: ' + day + '\n\n' + ns.system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

_GEMMA = """
{{- bos_token -}}
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}
{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""

_MISTRAL = """
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set users = turns | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == "user" %}
        {%- if tools is not none and message == users[-1] %}
            {{- "[AVAILABLE_TOOLS]" + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST]" + system + "\n\n" + message.content + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message.content + "[/INST]" }}
        {%- endif %}
    {%- elif message.role == "assistant" %}
        {{- " " + message.content + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, not " + message.role) }}
    {%- endif %}
{%- endfor %}
"""

_QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content.lstrip('\n') + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

_PHI3 = """
{% for message in messages %}
{% if message['role'] == 'system' %}
{{'<|system|>\n' + message['content'] + '<|end|>\n'}}
{% elif message['role'] == 'user' %}
{{'<|user|>\n' + message['content'] + '<|end|>\n'}}
{% elif message['role'] == 'assistant' %}
{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
"""

_PHI4 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

_COMMAND_R = """
{{- bos_token }}
{%- macro say(who, text) %}<|START_OF_TURN_TOKEN|><|{{ who }}_TOKEN|>{{ text }}<|END_OF_TURN_TOKEN|>{% endmacro %}
{%- if documents %}
    {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\n' }}
    {%- for document in documents %}
        {{- 'Document: ' ~ loop.index0 ~ '\n' }}
        {%- for key, value in document.items() %}{{ key }}: {{ value }}{{ '\n' if not loop.last }}{% endfor %}
    {%- endfor %}
    {{- '</results><|END_OF_TURN_TOKEN|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ say('SYSTEM', message.content) }}
    {%- elif message.role == 'user' %}{{ say('USER', message.content | trim) }}
    {%- else %}{{ say('CHATBOT', message.content | trim) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}
"""

_DEEPSEEK = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='') %}
{%- for message in messages if message['role'] == 'system' %}
    {%- set ns.system = ns.system + message['content'] %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' and message['content'] is not none %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<|Assistant|>' + content + '<|end_of_sentence|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}
"""

_GRANITE = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message, loop_messages = messages[0]['content'], messages[1:] %}
{%- else %}
    {%- set system_message = "Knowledge cutoff: April 2024.\nToday's Date: " + strftime_now('%B %d, %Y') + "." %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}
{%- if documents %}
    {%- set texts = documents | map(attribute='text') | join('\n\n') %}
    {{- '<|start_of_role|>documents<|end_of_role|>' + texts + '<|end_of_text|>\n' }}
{%- endif %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
    {%- if loop.last and add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
{%- endfor %}
"""

_SMOLLM3 = """
{%- set mode = reasoning_mode | default('/think') -%}
{%- if messages[0].role == 'system' -%}
    {%- if '/no_think' in messages[0].content %}{% set mode = '/no_think' %}{% endif -%}
    {%- set custom = messages[0].content.replace('/no_think', '').rstrip() -%}
{%- endif -%}
<|im_start|>system
Today: {{ strftime_now("%d %B %Y") }}
Mode: {{ mode }}

{{ custom | default('') }}<|im_end|>
{% for message in messages -%}
    {%- if message.role == 'user' -%}
        {{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' -%}
        {{ '<|im_start|>assistant\n' }}
        {%- generation -%}
        {%- if mode == '/think' -%}
            {{ message.content.lstrip('\n') + '<|im_end|>\n' }}
        {%- else -%}
            {{ '<think>\n\n</think>\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}
        {%- endif -%}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\n' + ('' if mode == '/think' else '<think>\n\n</think>\n') }}
{%- endif -%}
"""

_GLM = """[gMASK]<sop>
{%- if tools -%}
<|system|>
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- for m in messages -%}
<|{{ m.role }}|>
{{ m.content }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{% endif -%}
"""

_HERMES_TOOLS = """
{%- macro python_type(spec) -%}
    {%- if spec.type == 'string' %}str
    {%- elif spec.type == 'array' %}list[{{ python_type(spec['items']) }}]
    {%- else %}Any
    {%- endif -%}
{%- endmacro -%}
{{ '<|im_start|>system\nSignatures: ' }}
{%- for tool in tools -%}
    {%- set f = tool.function if tool.function is defined else tool -%}
    {%- for name, spec in f.parameters.properties | dictsort %}{{ name }}: {{ python_type(spec) }}{% endfor -%}
    {{ ' ' ~ (f | tojson) ~ '\n' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
"""

_GENERATION = """
{%- for m in messages %}
{% if m.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}

{% else %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

_BREAKS = """
{%- for m in messages -%}
    {%- if m.role == 'system' %}{% continue %}{% endif -%}
    {%- if loop.index > 6 %}{% break %}{% endif -%}
    {{ '### ' ~ m.role | capitalize ~ ':\n' ~ m.content ~ '\n' }}
    {{- eos_token ~ '\n' if m.role == 'assistant' else '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif -%}
"""

_PLAIN_END = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }} ///\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

_IM = ("<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")
FAMILIES: dict[str, Family] = {
    "chatml": Family(_CHATML, "<|im_end|>", _IM),
    "llama-2": Family(_LLAMA2, "<eos>", strips=True),
    "llama-3": Family(
        _LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), tools=TOOLS, strips=True
    ),
    "gemma": Family(_GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), takes_system=False, strips=True),
    "mistral": Family(
        _MISTRAL,
        "<eos>",
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        tools=TOOLS,
        moves_system=True,
    ),
    "qwen-3": Family(_QWEN3, "<|im_end|>", _IM, _THINK, arguments={"enable_thinking": False}, tools=TOOLS, strips=True),
    "phi-3": Family(_PHI3, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "phi-4": Family(_PHI4, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "command-r": Family(
        _COMMAND_R,
        "<|END_OF_TURN_TOKEN|>",
        (
            *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        arguments={"documents": DOCUMENTS},
        strips=True,
    ),
    # Some of its tokenizers do not mark the tokens of turns as special.
    "deepseek": Family(
        _DEEPSEEK, "<|end_of_sentence|>", ("<|end_of_sentence|>",), ("<|User|>", "<|Assistant|>", *_THINK)
    ),
    "granite": Family(
        _GRANITE,
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        arguments={"documents": DOCUMENTS},
    ),
    "smollm-3": Family(_SMOLLM3, "<|im_end|>", _IM, _THINK, arguments={"reasoning_mode": "/no_think"}, strips=True),
    "glm-4": Family(_GLM, "<|user|>", ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), tools=TOOLS),
    "hermes": Family(
        {"default": _CHATML, "tool_use": _HERMES_TOOLS.rstrip() + _CHATML.lstrip()}, "<|im_end|>", _IM, tools=TOOLS
    ),
    "generation": Family(_GENERATION, "<|im_end|>", _IM),
    "loop-controls": Family(_BREAKS, "<eos>", takes_system=False),
    "plain-end": Family(_PLAIN_END, " ///"),
}
