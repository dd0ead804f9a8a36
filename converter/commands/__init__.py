"""The commands, a file each. What they are made of is imported when one runs."""
