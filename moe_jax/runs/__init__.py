"""The folder of a run on disk: its files (`folder.py`), checkpoints (`checkpoint.py`) and their digests
(`manifest.py`), repair (`doctor.py`), and opening a trained model (`load.py`)."""
