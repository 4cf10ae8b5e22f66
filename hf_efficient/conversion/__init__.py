"""Weights in: one module for each outside format, over the ledger of `weight_transfer`.

    from hf_efficient.conversion.performer_pytorch import convert_performer_pytorch
    from hf_efficient.conversion.softmax_transformers import convert_softmax_transformer

Each returns a model of ours and a `ConversionReport`. What cannot be carried over raises a `ConversionError` that
names it; nothing is left out in silence.
"""
