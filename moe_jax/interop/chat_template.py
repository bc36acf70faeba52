"""The role format of tuned runs (`data/chats.py`) as templates of other programs.

A turn is its role, a line end, its content and the separator. In transformers and llama.cpp a template gives a text,
and the text is cut into tokens after that. There the characters of the separator (`<|endoftext|>`) inside a content
would be read as the separator. So the template puts a space into them, and no content can end its turn or begin
another.
"""


def jinja(separator: str) -> str:
    """For `tokenizer_config.json`, and for `tokenizer.chat_template` in GGUF."""
    harmless = separator[:-2] + " " + separator[-2:]
    return (
        f"{{{{ '{separator}' }}}}{{% for message in messages %}}"
        "{{ message['role'] + '\\n' + "
        f"(message['content'] | trim | replace('{separator}', '{harmless}')) + '{separator}' }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    )


def ollama(separator: str) -> str:
    """The Modelfile. ollama's templates replace nothing, so a content with the separator in it ends its turn there."""
    turns = f"{{{{ range .Messages }}}}{{{{ .Role }}}}\n{{{{ .Content }}}}{separator}{{{{ end }}}}assistant\n"
    return f'FROM ./model.gguf\nTEMPLATE """{turns}"""\nPARAMETER stop "{separator}"\n'
