"""Pages of one file: what the routing report, the page of the server and the page with a model inside share.

    assembly.py   markup, style and scripts joined into one document, and its content security policy
    parts/        style and scripts of all: colours of experts, chips of tokens, bars, builders of elements
    live/         the page on which a text is written, of `serve` and of `export --to html`

A page is written as separate files in a folder of its package.
"""
