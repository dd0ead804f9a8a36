"""Test assets: real Megatron models, a plain converter and a plain runtime to judge fuseport by.

What is compared with fuseport must not be made by it: only what drives it imports it, and that is
listed in `tests/test_imports.py`.
"""
