"""One encoder per modality: ResNets, ViTs and transformers."""
