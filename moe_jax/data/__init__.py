"""From text to batches of tokens: `corpora.py` (documents), `tokenizers.py`, `token_store.py` (files of token ids),
`batches.py` (training batches and evaluation windows), `synthetic/` (the embedded corpus)."""
