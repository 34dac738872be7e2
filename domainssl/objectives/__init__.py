"""Pretraining methods, one file each; `base.py` holds what they share."""
