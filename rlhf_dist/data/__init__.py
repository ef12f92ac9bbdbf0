"""Data: the embedded world, readers, formats, tokenizing, the prompt order, batches."""
