"""Where weights come from: Megatron-Core, in memory and on disk."""
