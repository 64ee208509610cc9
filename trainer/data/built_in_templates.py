"""Chat templates by name."""

from __future__ import annotations

WITH_CALLS = r"""
{%- macro written(message) %}
{%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '\n' if message.content or not loop.first }}
{{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{%- endmacro %}
{%- macro listed(tools) %}
{{- '\n\n' if system }}
{{- 'You may call functions. These are their signatures:\n<tools>' }}
{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
{{- '\n</tools>\nA call is a JSON object of name and arguments in XML tags:\n' }}
{{- '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>' }}
{%- endmacro %}
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if tools and system else messages %}
"""
CHATML = (
    WITH_CALLS
    + r"""
{%- if tools %}{{- '<|im_start|>system\n' + system + listed(tools) + '<|im_end|>\n' }}{%- endif %}
{%- for message in rest %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ written(message) + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
)
LLAMA3 = (
    WITH_CALLS
    + r"""
{{- bos_token }}
{%- if tools %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + (system + listed(tools)) | trim + '<|eot_id|>' }}
{%- endif %}
{%- for message in rest %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ written(message) | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- message.content | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
)
PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
{{- message.role | capitalize + ':' }}
{%- if message.role == 'assistant' %}{% generation %}{{ ' ' + (message.content or '') + eos_token }}{% endgeneration %}
{%- else %}{{- ' ' + message.content }}{%- endif %}
{{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{% endif %}"""
RAW = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ (message.content or '') + eos_token }}{% endgeneration %}
{%- else %}{{- message.content }}{%- endif %}
{%- endfor %}"""
BUILT_IN = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN, "raw": RAW}
"""Templates by name. ``plain`` writes roles as words and needs no special token; ``raw`` is the contents end to end."""
NEEDED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Special tokens that a tokenizer must have for a template."""
