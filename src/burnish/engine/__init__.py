"""Who runs the step: plain PyTorch or DeepSpeed, behind one protocol."""
