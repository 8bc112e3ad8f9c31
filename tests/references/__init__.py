"""Vision transformers with tokens left out by hand: eager PyTorch, nothing of tokenpass.

:mod:`rule` chooses tokens, :mod:`token_reduction` runs an encoder and drops them, and one module
for each library says how its encoders embed, attend and pool, with the model's own layers.
"""
