"""Kernels for CPUs that multiply bf16 in hardware: documents' attention, and the softmax of the head.

aten computes attention in fp32, at a sixth of the rate of matrix products, or rounds the scores to 8 bits;
and a softmax made of its operations reads the logits, the largest tensor of a step, seven times. Ours are
small programs in C, compiled on first use for the machine at hand (`build.py`). Where that cannot be done,
nothing is lost but time: who calls keeps a way by aten.
"""
