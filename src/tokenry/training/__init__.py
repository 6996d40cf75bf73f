"""Which tokens teach? Objectives and recipes for transformers' Trainer.

corpus    texts to packed token blocks
pretrain  a small causal model from token blocks
"""
