"""Test assets: real Megatron models, a plain converter and a plain runtime to judge fuseport by.

Nothing here imports fuseport: what is compared with it must not be made by it.
"""
