"""Exports, opened by other programs: transformers (extra `peers`) and llama.cpp (group `interop`)."""
