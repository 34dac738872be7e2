"""Items to batches: order, workers, memory, position."""
