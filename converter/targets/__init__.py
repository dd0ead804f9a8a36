"""What weights become: TensorRT-LLM's unified checkpoint."""
