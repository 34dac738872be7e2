"""What watches a run: progress, speed, checkpoints, pictures, evaluation and a summary."""
