"""Chat templates of the shapes that checkpoints have, written for these tests."""

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>' ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Roles between tags of their own; tools and documents in the system message; parts of content.
GRANITE = """\
{%- set tools_start = 'You have access to these tools within <tools></tools>:\\n<tools>' %}
{%- set tools_end = '\\n</tools>\\nCall one with <tool_call>{"name": ..., "arguments": ...}</tool_call>' %}
{%- set first = messages[0] %}
{%- set ns = namespace(system='', text='') %}
{%- if first.role == 'system' %}
    {%- if first.content is string %}
        {%- set ns.system = first.content %}
    {%- else %}
        {%- for part in first.content if part.type == 'text' %}
            {%- set ns.system = ns.system + part.text %}
        {%- endfor %}
    {%- endif %}
{%- endif %}
{%- if tools %}
    {%- set ns.system = (ns.system ~ '\\n\\n' if ns.system else '') ~ tools_start %}
    {%- for tool in tools %}
        {%- set ns.system = ns.system ~ '\\n' ~ (tool | tojson) %}
    {%- endfor %}
    {%- set ns.system = ns.system ~ tools_end %}
{%- endif %}
{%- if documents %}
    {%- set ns.system = ns.system ~ '\\n\\nDocuments:' %}
    {%- for document in documents %}
        {%- set ns.system = ns.system ~ '\\n' ~ (document | tojson(indent=2)) %}
    {%- endfor %}
{%- endif %}
{%- if ns.system %}
{{- '<|start_of_role|>system<|end_of_role|>' + ns.system + '<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set ns.text = message.content %}
    {%- else %}
        {%- set ns.text = '' %}
        {%- for part in message.content or [] %}
            {%- if part.type == 'text' %}{% set ns.text = ns.text + part.text %}{% endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '<|start_of_role|>user<|end_of_role|>' + ns.text + '<|end_of_text|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' + ns.text }}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if (loop.first and ns.text) or not loop.first %}{{- '\\n' }}{% endif %}
                {%- if call.function %}{% set call = call.function %}{% endif %}
                {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
                {{- call.arguments if call.arguments is string else call.arguments | tojson }}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|end_of_text|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}
            {{- '<|start_of_role|>user<|end_of_role|>' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + ns.text + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|end_of_text|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}
"""

# Reasoning stays for the last question only, and the reply begins inside of it.
NEMOTRON = """\
{%- macro one_tool(tool) %}
<function>
<name>{{ tool.name }}</name>
{%- for key, value in tool.parameters.properties | dictsort %}
<parameter name="{{ key }}">{{ value | tojson(sort_keys=true) }}</parameter>
{%- endfor %}
</function>
{%- endmacro %}
{%- set enable_thinking = enable_thinking if enable_thinking is defined else true %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if messages[0].role == 'system' or tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0].content | trim if messages[0].role == 'system' }}
    {%- for tool in tools or [] %}
        {{- one_tool(tool.function) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if message.reasoning_content %}
            {%- set content = '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n' ~ content %}
        {%- endif %}
        {%- if loop.index0 < ns.last and '</think>' in content %}
            {%- set content = '<think></think>' ~ content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' ~ content ~ '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if enable_thinking else '<think></think>') }}
{%- endif %}
"""

FALCON = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}<|im_start|>system
{{ message['content'] }}{% if tools %}

You are a function calling AI model. Signatures: <tools>
{{ tools | tojson(indent=4) }}
</tools>{% endif %}<|im_end|>
{% elif message['role'] == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content | tojson }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message['role'] }}
{% generation %}{{ message['content'] | trim }}{% endgeneration %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Respond with JSON for a function call.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role in ["user", "assistant"] and not message.tool_calls %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Conversation roles must alternate user/assistant/user/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools and message == (loop_messages | selectattr("role", "equalto", "user") | list)[-1] %}
            {{- "[AVAILABLE_TOOLS] " + (tools | map(attribute="function") | list | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] " + (message.tool_calls | map(attribute="function") | list | tojson) + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

ALL = {
    "chatml": CHATML,
    "granite": GRANITE,
    "nemotron": NEMOTRON,
    "falcon": FALCON,
    "llama": LLAMA,
    "mistral": MISTRAL,
}
