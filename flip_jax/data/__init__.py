"""From records on disk to batches in host memory: readers, transforms, tokenizer, pipeline."""
