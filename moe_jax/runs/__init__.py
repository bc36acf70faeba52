"""The folder of a run on disk, and a trained model opened from it.

folder.py         its lock, its paths, and the files that training writes
catalog.py        the runs that a name finds, and the models of the package
records.py        metrics.jsonl, summary.json and the routing snapshots, read
checkpoint.py     checkpoints: saved, listed, verified, restored
manifest.py       the digests of a checkpoint's files
arrays.py         arrays by name, and files of safetensors
orbax_state.py    what orbax does: the state of training, the commit, the retention
load.py           what a checkpoint belongs to, and a trained model opened from it
"""
