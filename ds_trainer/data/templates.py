"""The built-in chat templates.

All of them trim contents: most tokenizers join a line break with the white space after it, so that the first token of an
answer that starts with a space would also belong to the header. All of them mark what is trained, tool calls included.
"""

from __future__ import annotations

PLAIN = (
    "{% if tools %}{{ 'tools:\\n' + tools | tojson + '\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'assistant:\\n' }}"
    "{% generation %}"
    "{{ message['content'] | trim }}"
    "{% for call in message['tool_calls'] %}"
    "{{ '\\n' if message['content'] | trim or not loop.first }}{{ 'call: ' + call['function'] | tojson }}"
    "{% endfor %}"
    "{{ eos_token }}"
    "{% endgeneration %}"
    "{{ '\\n' }}"
    "{% else %}"
    "{{ message['role'] + ':\\n' + message['content'] | trim + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""Roles in plain words, so that no token has to be added to the vocabulary.

Tools stand first, as a JSON list; a call is a line `call: {"name": ..., "arguments": {...}}` at the end of an answer.
"""

CHATML = (
    "{% if tools %}"
    "{{ '<|im_start|>system\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim + '\\n\\n' }}{% endif %}"
    "{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n\' }}'
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}"
    "{{ message['content'] | trim }}"
    "{% for call in message['tool_calls'] %}"
    "{{ '\\n' if message['content'] | trim or not loop.first }}"
    "{{ '<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>' }}"
    "{% endgeneration %}"
    "{{ '\\n' }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|im_start|>user' if loop.previtem['role'] != 'tool' }}"
    "{{ '\\n<tool_response>\\n' + message['content'] | trim + '\\n</tool_response>' }}"
    "{{ '<|im_end|>\\n' if loop.nextitem is not defined or loop.nextitem['role'] != 'tool' }}"
    "{% elif not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, with tools, calls and results as Qwen 2.5 writes them."""

LLAMA3 = (
    "{% if tools or messages[0]['role'] == 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{% if tools %}"
    "{{ 'Environment: ipython\\n\\nYou have access to the following functions. To call one, respond with a JSON object "
    'of the form {"name": function name, "parameters": dictionary of argument name and its value}.\\n\\n\' }}'
    "{% for tool in tools %}{{ tool | tojson + '\\n\\n' }}{% endfor %}"
    "{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% endif %}"
    "{{ '<|eot_id|>' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% generation %}"
    "{{ message['content'] | trim }}"
    "{% for call in message['tool_calls'] %}"
    "{{ '\\n' if message['content'] | trim or not loop.first }}"
    "{{ '{\"name\": ' + call['function']['name'] | tojson + ', \"parameters\": ' }}"
    "{{ call['function']['arguments'] | tojson + '}' }}"
    "{% endfor %}"
    "{{ '<|eot_id|>' }}"
    "{% endgeneration %}"
    "{% elif message['role'] != 'system' %}"
    "{{ '<|start_header_id|>' + ('ipython' if message['role'] == 'tool' else message['role']) }}"
    "{{ '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""Llama 3's headers; without the dates that Llama 3.1 writes, with its JSON for calls and its `ipython` for results."""

TEMPLATES = {"plain": PLAIN, "chatml": CHATML, "llama3": LLAMA3}
CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""What a tokenizer must have as single tokens."""
