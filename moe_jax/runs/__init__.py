"""The folder of a run on disk, and a trained model opened from it.

folder.py            its lock, its paths, and the files that training writes
metrics.py           metrics.jsonl, read
summary.py           summary.json, read
snapshots.py         the decisions of its routers at each evaluation, read
checkpoint.py        checkpoints: saved, listed, verified
arrays.py            the arrays of a checkpoint
safetensors_file.py  files of safetensors, written one tensor at a time
manifest.py          the digests of a checkpoint; migrations.py reads those of earlier versions
identity.py          what a checkpoint belongs to: its run, its model, its tokenizer
load.py              a trained model, opened
doctor.py            every file checked, and repaired where that is possible (`doctor`)
verify_resume.py     a run that is killed and resumed, compared with one that never stops (`verify-resume`)
"""
