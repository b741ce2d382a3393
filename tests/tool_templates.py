"""Small chat templates with the ways in which well-known families write tool calls and their results.

They are written for these tests, as those of `tests.chat_templates` are.
"""

from __future__ import annotations

from tests.chat_templates import TOOLS, Family

_HERMES_CALLS = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{ '\\n' + m.content }}{% endif %}
        {%- for call in m.tool_calls %}
            {%- if call.function is defined %}{% set call = call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

_LLAMA31_CALLS = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system, messages = messages[0].content | trim, messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('One call at a time.') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eom_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

_MISTRAL_CALLS = """
{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
        {{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in m.tool_calls %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
    {%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Roles are user, assistant and tool.') }}
    {%- endif %}
{%- endfor %}
"""

_GLM_CALLS = """[gMASK]<sop>
{%- for m in messages -%}
{%- if m.role == 'tool' %}<|observation|>
{{ m.content }}
{%- else %}<|{{ m.role }}|>
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}
{{ call.function.arguments | tojson(ensure_ascii=False) }}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{% endif -%}
"""

_GEMMA4_CALLS = """
{{- bos_token -}}
{%- for m in messages -%}
    {%- if m.role == 'tool' -%}
        {{- m.content + '<tool_response|>' -}}
    {%- else -%}
        {%- set role = 'model' if m.role == 'assistant' else m.role -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|turn>' + role + '\\n' }}{% endif -%}
        {%- for call in m.tool_calls or [] -%}
            {{- '<|tool_call>call:' + call.function.name + (call.function.arguments | tojson) + '<tool_call|>' -}}
        {%- endfor -%}
        {{- (m.content or '') | trim + ('<|tool_response>' if m.tool_calls else '<turn|>\\n') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{ '<|turn>model\\n' }}{%- endif -%}
"""

_PLAIN_CALLS = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %} {{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}"
    " ///\n{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

_IM = ("<|im_start|>", "<|im_end|>")
TOOL_FAMILIES: dict[str, Family] = {
    # Its calls and results stand in tokens that are not special.
    "hermes": Family(
        _HERMES_CALLS,
        "<|im_end|>",
        _IM,
        ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        tools=TOOLS,
    ),
    # A call ends in another way than an answer, and its turn has no text.
    "llama-3.1": Family(
        _LLAMA31_CALLS,
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        tools=TOOLS,
        strips=True,
    ),
    # The tools stand before the last user's turn, whose place changes.
    "mistral": Family(
        _MISTRAL_CALLS,
        "<eos>",
        (
            *tuple(f"[{end}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for end in ("", "/")),
            "[TOOL_CALLS]",
        ),
        takes_system=False,
        tools=TOOLS,
    ),
    # A turn ends where the next role begins.
    "glm-4": Family(
        _GLM_CALLS,
        "<|user|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        tools=TOOLS,
    ),
    # The result comes within the turn of the call, whose end is the token that opens it.
    "gemma-4": Family(
        _GEMMA4_CALLS,
        "<turn|>",
        ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
        tools=TOOLS,
        strips=True,
    ),
    "plain-end": Family(_PLAIN_CALLS, " ///", tools=TOOLS),
}
