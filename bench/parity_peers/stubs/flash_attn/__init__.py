"""What OpenRLHF's modules import of flash-attn, in plain torch, for machines without CUDA (bench/parity.py).

Only the padding helpers are here. Attention itself is never called from this package: OpenRLHF is run with
`--ds.attn_implementation sdpa`, which is an option of its own.
"""
