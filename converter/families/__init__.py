"""Tables of architectures in the Hugging Face layout, a file each."""
