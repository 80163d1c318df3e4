"""The parts of `slim.py`: reading and writing, planning, trimming, the other files of a folder, and the check."""
