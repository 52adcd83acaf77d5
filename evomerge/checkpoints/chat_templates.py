"""Chat templates by name, from the formats' public definitions."""

from __future__ import annotations

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_ALPACA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}
{{- '### Response:\\n' + message['content'] }}{{- eos_token }}{{- '\\n\\n' }}
{%- else %}
{{- raise_exception('the role ' + message['role'] + ' is unknown; use system, user and assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\\n' }}
{%- endif %}
"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """\
{{- bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set system.text = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '[INST] ' + system.text + message['content'] + ' [/INST]' }}
{%- set system.text = '' %}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] | trim }}{{- eos_token }}
{%- else %}
{{- raise_exception('the role ' + message['role'] + ' is unknown; use system, user and assistant') }}
{%- endif %}
{%- endfor %}
"""

_EXAONE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{{- '[|' + message['role'] + '|]' + message['content'] }}
{%- if message['role'] == 'user' %}
{{- '\\n' }}
{%- else %}
{{- '[|endofturn|]\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '[|assistant|]' }}
{%- endif %}
"""

BUILT_IN: dict[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "exaone": _EXAONE,
}
"""Jinja templates by the name of the format."""
