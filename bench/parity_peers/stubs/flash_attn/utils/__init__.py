"""See `flash_attn.utils.distributed`."""
