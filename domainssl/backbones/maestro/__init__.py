"""The encoder of MAESTRO and its file layouts."""
