"""Pages of one file: what the routing report and the page of the server share.

    assembly.py   markup, style and scripts joined into one document, and its content security policy
    parts/        style and scripts of both: colours of experts, chips of tokens, bars, builders of elements

A page is written as separate files in the folder `page/` of its package.
"""
