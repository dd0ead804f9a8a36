"""Where weights come from: Megatron-Core, in memory and on disk, and Hugging Face's files."""
