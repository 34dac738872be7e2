"""One training run: request, folder, record, execution."""
