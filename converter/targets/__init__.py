"""What weights become: TensorRT-LLM's unified checkpoint, or the Hugging Face layout."""
