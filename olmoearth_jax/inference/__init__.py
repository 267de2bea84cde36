"""Using pretrained models: samples in raw units, embeddings, maps."""
