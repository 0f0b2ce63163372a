"""Images that look alike to an encoder: an index of embeddings, search, and how good it is."""
